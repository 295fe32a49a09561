"""A checkpoint with something in every place, and transformers with a model that it can load."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported import VOCAB_SIZE, checkpoint, written
from torch import nn

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.optim import OptimConfig, build_optimizer, optimizer_state


def _sizes(n: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=30,
        context_length=8,
        layers=2,
        width=8,
        heads=2,
        tokens=Tokens(query=n, key=n, value=n, output=n, ffn=2 * n),
        init="published",
    )


def _full_checkpoint(step: int = 3) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = TokenFormer(_sizes(4))
    model.init_weights(generator)
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.randint(30, (2, 9), generator=generator)
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    return Checkpoint(
        config=model.config,
        weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
        optimizer=optimizer_state(model, optimizer),
        train_state={"step": step, "tokens": 16 * step, "flops": 1.5e18, "rungs": []},
        run={"out": "runs/a", "optim": {"lr": 6e-4, "betas": [0.9, 0.95]}, "seed": None},
        lineage=[{"source": {"step": 1}, "drift": {"relative": 1e-16}}],
        tokenizer='{"version": "1.0", "text": "Zoë ⟨end⟩"}',
        end_of_text="<|end|>",
    )


@pytest.fixture(scope="session")
def sizes() -> Callable[[int], ModelConfig]:
    """`sizes(n)`: n parameter tokens per role, 2 n in the FFN."""
    return _sizes


@pytest.fixture
def full_checkpoint() -> Callable[..., Checkpoint]:
    """`full_checkpoint(step)`: after one update, with weights of the step's own."""
    return _full_checkpoint


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """transformers, offline, which copies the code of a folder where no other test sees it."""
    cache = tmp_path_factory.mktemp("hf_modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers
        from transformers import dynamic_module_utils

        # Not by its environment variable: another test may have imported transformers before.
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setattr(sys, "path", [*sys.path])
        yield transformers


@pytest.fixture(scope="session")
def load(hub: ModuleType) -> Callable[..., nn.Module]:
    """`load(folder, **options)`: the causal model, in eval mode."""

    def load(folder: Path, **options: Any) -> nn.Module:
        made = hub.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
        return made.eval()

    return load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer; not to be written to."""
    return written(tmp_path_factory.mktemp("hf") / "plain", checkpoint())


@pytest.fixture(scope="session")
def tokenizer(corpus: TextCorpus) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), corpus)
