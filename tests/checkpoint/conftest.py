"""A checkpoint whose every field is set."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tokengrow.checkpoint.schema import (
    Drift,
    LineageEntry,
    LineageSource,
    LineageStep,
    LineageTarget,
    RecordedRun,
    TrainState,
)
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.state import collect_optimizer_state


def _sizes(n: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=30,
        context_length=8,
        layers=2,
        width=8,
        heads=2,
        tokens=ParameterTokens(query=n, key=n, value=n, output=n, ffn=2 * n),
        init="published",
    )


def _entry() -> LineageEntry:
    """Return the record of one growth."""
    config = _sizes(2).to_dict()
    return LineageEntry(
        source=LineageSource(parameters=10, step=1, weights_sha256=None, config=config),
        target=LineageTarget(parameters=20, config=_sizes(4).to_dict()),
        steps=(LineageStep("tokens", {"tokens.ffn": [4, 8]}),),
        drift=Drift("float64", 256, 1e-15, 1e-16, 1e-16, 0.0, 3.5, 3.5),
        settings={"new_block_place": "spread"},
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
        optimizer=collect_optimizer_state(model, optimizer),
        train_state=TrainState("a" * 64, step=step, tokens=16 * step, flops=1.5e18),
        run=RecordedRun(stages={}, seed=3, settings={"out": "runs/a", "log_every": 10}),
        lineage=(_entry(),),
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
