"""Gradients that are not finite: remembered where they are seen, told when somebody looks."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.training.adamw import AgedAdamW
from tokengrow.training.finite import GradientWatch
from tokengrow.training.fit import fit
from tokengrow.training.ladder import StageConfig, TrainConfig
from tokengrow.training.optim import OptimConfig

CPU = torch.device("cpu")


@pytest.fixture
def stage(tiny_run: Callable[..., TrainConfig], tmp_path: Path) -> StageConfig:
    return tiny_run(tmp_path).stages[0]


def test_finite_gradients_are_let_through(stage: StageConfig) -> None:
    watch = GradientWatch(CPU)
    assert watch.see(1, torch.tensor(3.0), torch.tensor(5.0), 1e-3).item() == 0
    watch.check(stage)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_from_the_first_that_is_not_no_update_is_taken(stage: StageConfig, bad: float) -> None:
    watch, loss = GradientWatch(CPU), torch.tensor(5.25)
    norms = (1.0, bad, 1.0, bad)
    skipped = [
        watch.see(i, torch.tensor(norm), loss * i, 1e-3).item() for i, norm in enumerate(norms, 1)
    ]
    assert skipped == [0, 1, 1, 1]
    with pytest.raises(
        UserError, match=r"n8, step 2: .* not finite \(loss 10\.5, learning rate 0\.001\)"
    ):
        watch.check(stage)


def test_a_skipped_update_leaves_weights_and_moments(device: torch.device = CPU) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = AgedAdamW([{"params": [weight]}], lr=0.1, fused=None)
    for flag, moved in ((1.0, False), (0.0, True)):
        weight.grad = torch.ones_like(weight)
        optimizer.skip_where(torch.tensor(flag))
        optimizer.step()
        assert bool((weight != 1).all()) is moved
        assert bool(optimizer.state[weight]) is moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_fused_optimizer_skips_on_the_device() -> None:
    weight = nn.Parameter(torch.ones(3, 2, device="cuda"))
    optimizer = AgedAdamW([{"params": [weight]}], lr=0.1, fused=True)
    for flag, steps in ((0.0, 1), (1.0, 1), (0.0, 2)):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.skip_where(torch.tensor(flag, device="cuda"))
        optimizer.step()
        assert torch.equal(weight, before) is (flag == 1)
        assert optimizer.state[weight]["step"].item() == steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_ran_ahead_saves_nothing_behind_the_last_finite_update(
    tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=40, fabric=FabricConfig(accelerator="cuda"))
    wild = replace(run.stages[0], optim=OptimConfig(lr=1e30, warmup_steps=0, schedule="constant"))
    run = replace(run, stages=(wild,), log_every=10, validation_every=100, checkpoint_every=20)
    with pytest.raises(UserError, match=r"stage n8, step [23]: the gradient is not finite"):
        fit(run, store)
    assert not list((tmp_path / "run").glob("step_*"))
