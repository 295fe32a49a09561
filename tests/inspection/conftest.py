"""Fixtures: a small model, and the same model grown along two axes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tokengrow.checkpoint.schema import TrainState
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import plan_growth
from tokengrow.inspection.analysis import Inspection, inspect_checkpoint
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer


@pytest.fixture(scope="session")
def text() -> torch.Tensor:
    """Random token ids [2, 32]."""
    return torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Callable[..., ModelConfig]) -> list[Checkpoint]:
    """Model with published initial weights at step 20, and the same grown along two axes."""
    model = TokenFormer(tiny_model(8, init="published"))
    model.init_weights(torch.Generator().manual_seed(0))
    source = replace(Checkpoint.of(model), train_state=TrainState("tokens", step=20))
    target = replace(
        source.config,
        layers=3,
        tokens=ParameterTokens(query=12, key=12, value=12, output=12, ffn=20),
    )
    return [source, grow_checkpoint(source, plan_growth(source.config, target))]


@pytest.fixture(scope="module")
def grown(checkpoints: list[Checkpoint], text: torch.Tensor) -> Inspection:
    """Inspection of the grown model."""
    return inspect_checkpoint(checkpoints[1], text)
