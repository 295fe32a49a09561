"""A checkpoint that reads a whole question, and questions of the harness's tasks on disk."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.evaluation.loaded_model import LoadedModel
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

if TYPE_CHECKING:  # what needs no harness is tested where there is none, on a GPU say
    from lm_eval.api.instance import Instance

Place = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def task_files() -> Path:
    """The first 40 questions of LAMBADA and PIQA, and a few by hand of each other task."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def judged(
    store: TokenStore,
    tiny_model: Callable[..., ModelConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint of random weights, far from uniform, that takes 512 tokens; not to be written
    to."""
    model = TokenFormer(tiny_model(context_length=512, init="published"))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    tokenizer = store.tokenizer()
    texts = {"tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text_token}
    folder = tmp_path_factory.mktemp("judged") / "run" / "step_00000000"
    return save_checkpoint(folder, replace(Checkpoint.of(model), **texts))


@pytest.fixture(scope="session")
def placed(judged: Path) -> Place:
    """`placed(batch_size)`: that checkpoint on the CPU."""

    def place(batch_size: int | None = None) -> LoadedModel:
        cpu = torch.device("cpu")
        return LoadedModel.from_checkpoint(
            load_checkpoint(judged), cpu, "32-true", nullcontext, batch_size
        )

    return place


@pytest.fixture(scope="session")
def asked(task_files: Path) -> "Callable[..., Sequence[Instance]]":
    """`asked(task)`: what the harness asks a model for the questions of a task."""
    from tokengrow.evaluation.harness_tasks import load_tasks, silence_harness

    def requests(name: str, limit: int = 40) -> "Sequence[Instance]":
        with silence_harness():
            (task,) = load_tasks([name], task_files).loaded["tasks"].values()
            task.build_all_requests(limit=limit)
        return task.instances

    return requests
