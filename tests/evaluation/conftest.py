"""Fixtures: a checkpoint with a context of 512 tokens, and question files of harness tasks."""

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

if TYPE_CHECKING:  # tests without the harness also run where it is not installed
    from lm_eval.api.instance import Instance

LoadModel = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def task_files() -> Path:
    """Question files: 40 each of LAMBADA and PIQA, a few handwritten ones of each other task."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def eval_checkpoint(
    store: TokenStore,
    tiny_model: Callable[..., ModelConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Read-only checkpoint with a context of 512 tokens; random weights, far from uniform."""
    model = TokenFormer(tiny_model(context_length=512, init="published"))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    tokenizer = store.tokenizer()
    texts = {"tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text_token}
    folder = tmp_path_factory.mktemp("evaluation") / "run" / "step_00000000"
    return save_checkpoint(folder, replace(Checkpoint.of(model), **texts))


@pytest.fixture(scope="session")
def load_model(eval_checkpoint: Path) -> LoadModel:
    """Return a function of the batch size that loads the checkpoint on the CPU."""

    def load(batch_size: int | None = None) -> LoadedModel:
        return LoadedModel.from_checkpoint(
            load_checkpoint(eval_checkpoint),
            torch.device("cpu"),
            "32-true",
            nullcontext,
            batch_size,
        )

    return load


@pytest.fixture(scope="session")
def task_requests(task_files: Path) -> "Callable[..., Sequence[Instance]]":
    """Return a function of a task's name that builds the harness's requests for it."""
    from tokengrow.evaluation.harness_tasks import load_tasks, silence_harness

    def requests(name: str, limit: int = 40) -> "Sequence[Instance]":
        with silence_harness():
            (task,) = load_tasks([name], task_files).loaded["tasks"].values()
            task.build_all_requests(limit=limit)
        return task.instances

    return requests
