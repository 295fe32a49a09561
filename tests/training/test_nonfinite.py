"""Losses and gradients that are not finite: which updates are taken, what is counted, and when the
run stops."""

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_at, same_bits
from rich.console import Console
from torch import Tensor, nn

from tokengrow.checkpoint.schema import TrainState
from tokengrow.data.corpus import Split
from tokengrow.data.sequences import Sequences
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.optim.adamw import AgedAdamW, Ages
from tokengrow.optim.config import OptimConfig
from tokengrow.training.config import TrainConfig
from tokengrow.training.module import TokenFormerModule
from tokengrow.training.nonfinite import NONFINITE_FILE, GradientMonitor, poison_nonfinite_grad
from tokengrow.training.trainer import fit

CPU = torch.device("cpu")
BAD = [math.nan, math.inf, -math.inf]
Runs = Callable[..., TrainConfig]


# What the device counts


def flags(watch: GradientMonitor, norms: list[float]) -> list[float]:
    """Return which updates are skipped for gradients of these norms, in order."""
    return [
        watch.observe(update, torch.tensor(norm), torch.tensor([float(update)])).item()
        for update, norm in enumerate(norms, 1)
    ]


@pytest.mark.parametrize("bad", BAD)
def test_only_updates_with_nonfinite_gradient_are_skipped(bad: float) -> None:
    watch = GradientMonitor(CPU, limit=10)
    assert flags(watch, [1.0, bad, 1.0, bad, bad, 1.0]) == [0, 1, 0, 1, 1, 0]
    seen = watch.read()
    assert (seen.skipped, seen.in_a_row, seen.update) == (3, 0, 5)
    assert seen.losses == [5.0]


def test_a_look_counts_from_the_one_before() -> None:
    watch = GradientMonitor(CPU, limit=10)
    flags(watch, [math.nan, 1.0])
    assert watch.read().skipped == 1
    assert watch.read().skipped == 0


def test_past_the_limit_no_update_is_taken_until_somebody_looks() -> None:
    watch = GradientMonitor(CPU, limit=2)
    assert flags(watch, [1.0, math.nan, math.nan, math.nan, 1.0, 1.0]) == [0, 1, 1, 1, 1, 1]
    seen = watch.read()
    assert (seen.in_a_row, seen.update) == (3, 4), "those that came later do not count"


def test_a_row_goes_on_in_the_next_session() -> None:
    watch = GradientMonitor(CPU, limit=2, in_a_row=2)
    flags(watch, [math.nan, 1.0])
    assert watch.read().in_a_row == 3


@pytest.mark.parametrize("bad", BAD)
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(bad: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    poison_nonfinite_grad(weight.sum() + bad).backward()
    assert weight.grad is not None and weight.grad.isnan().all()


def test_a_finite_loss_and_its_gradient_keep_every_bit() -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = weight.exp().sum()
    (gradient,) = torch.autograd.grad(plain, weight, retain_graph=True)
    told = poison_nonfinite_grad(plain)
    assert torch.equal(told, plain)
    assert torch.equal(torch.autograd.grad(told, weight)[0], gradient)


# What an optimizer does with it

FUSED = pytest.mark.parametrize("fused", [None, True], ids=["foreach", "fused"])
DEVICE = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


def taught(norms: list[float], fused: bool | None, device: str, ages: bool) -> dict[str, Tensor]:
    """Return a parameter, its state and its ages after gradients of which some are skipped."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(1 + len(norms), 5, 6, generator=generator).to(device)
    weight = nn.Parameter(start.clone())
    optimizer = AgedAdamW([{"params": [weight]}], lr=0.1, betas=(0.5, 0.5), fused=fused)
    if ages:
        rows, columns = torch.tensor([9] * 3 + [0] * 2), torch.tensor([9] * 4 + [0] * 2)
        optimizer.set_ages({weight: Ages(rows, columns)})
    optimizer.begin_stage(GrowthConfig(new_warmup_steps=4), updates_done=0)
    for gradient, norm in zip(gradients, norms, strict=True):
        weight.grad = gradient * norm
        flag = torch.tensor(float(not math.isfinite(norm)), device=device)
        optimizer.skip_if(flag)
        optimizer.step()
    found = {"weight": weight.detach(), **optimizer.state[weight]}
    for kept in optimizer.ages().values():
        assert kept.columns is not None
        found |= {"rows": kept.rows, "columns": kept.columns}
    return found


@DEVICE
@FUSED
@pytest.mark.parametrize("ages", [False, True], ids=["one age", "several ages"])
def test_after_skipped_updates_all_is_as_if_they_had_never_come(
    fused: bool | None, device: str, ages: bool
) -> None:
    # 40 updates at betas of 0.5 make the new entries old: the last ones are the fused kernel's.
    norms = [1.0] * 40
    for place in (0, 3, 4, 17, 38, 39):
        norms[place] = math.nan
    found = taught(norms, fused, device, ages)
    # The same gradients without those that were skipped.
    kept = [0.0 if math.isnan(norm) else norm for norm in norms]
    whole = _taught_only(kept, fused, device, ages)
    assert found.keys() == whole.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.cpu(), whole[name].cpu()), name
    assert found["step"].item() == 34


def _taught_only(
    norms: list[float], fused: bool | None, device: str, ages: bool
) -> dict[str, Tensor]:
    """`taught` by an optimizer to which the gradients of norm 0 are never shown."""
    step = AgedAdamW.step

    def seldom(self: AgedAdamW, closure: Any = None) -> Any:
        (weight,) = self.param_groups[0]["params"]
        return step(self, closure) if weight.grad.any() else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgedAdamW, "step", seldom)
        return taught(norms, fused, device, ages)


def test_a_flag_is_of_one_update() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = AgedAdamW([{"params": [weight]}], lr=0.1, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.skip_if(torch.tensor(1.0))
    optimizer.step()
    assert (weight == 1).all()
    optimizer.step()
    assert (weight != 1).all()


# What a run does


@contextmanager
def spoiled(*batches: int, loss: float = math.nan, batch_size: int = 4) -> Iterator[None]:
    """Make the loss of these global batches non-finite with a finite gradient."""
    step, seen = TokenFormerModule.training_step, iter(range(10**6))

    def spoils(self: TokenFormerModule, batch: Tensor, index: int) -> Tensor:
        own = step(self, batch, index)
        return own + loss if next(seen) in batches else own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenFormerModule, "training_step", spoils)
        yield


def wild(run: TrainConfig, **changes: Any) -> TrainConfig:
    """Return a run whose learning rate makes the weights non-finite at the first update."""
    optim = OptimConfig(lr=1e30, warmup_steps=0, schedule="constant")
    return replace(run, stages=(replace(run.stages[0], optim=optim),), **changes)


@pytest.mark.fault(
    "one loss is NaN or infinite",
    "added to the loss of a batch, its gradient left finite",
    "the update is skipped, counted and told; the run ends",
)
@pytest.mark.parametrize("loss", BAD)
def test_batch_with_nonfinite_loss_is_skipped_and_reported(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, loss: float
) -> None:
    told = io.StringIO()
    with spoiled(2, loss=loss):
        done = fit(tiny_run(tmp_path / "run", rungs=(8,)), store, Console(file=told))
    (line,) = (line for line in told.getvalue().splitlines() if "non-finite" in line)
    assert line.startswith("stage n8, step 3: non-finite gradient (loss ")
    assert line.endswith("global batch 2); update skipped (1 in a row, at most 10 allowed)")
    assert (done.state.rung.skipped, done.state.skipped_in_a_row) == (1, 0)
    assert (done.state.step, done.state.next_batch) == (6, 6), "the schedule and the data go on"
    assert done.checkpoint.optimizer["step.embedding.weight"] == 5
    assert all(tensor.isfinite().all() for tensor in done.checkpoint.weights.values())


@pytest.mark.fault(
    "every gradient is NaN",
    "a learning rate of 1e30",
    "the run stops past its limit; nonfinite.json names the batch",
)
def test_too_many_skipped_updates_stop_run_and_record_batch(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = wild(tiny_run(tmp_path / "run", rungs=(8,), steps=20), max_skipped_steps=2)
    run = replace(run, validation_every=100, checkpoint_every=1, micro_batch_size=2)
    with pytest.raises(UserError, match=r"3 updates in a row were skipped, more than max_skipped"):
        fit(run, store)
    found = json.loads((tmp_path / "run" / NONFINITE_FILE).read_text())
    last = found["step"]
    assert last in (4, 5), "the first update, or the first two, are taken; then three are not"
    assert (found["stage"], found["global_batch"], found["skipped_in_a_row"]) == ("n8", last - 1, 3)
    order = store.sequences("train", 32).batch_indices(last - 1, 4, seed=0)
    assert found["sequences"] == order.tolist()
    assert (found["grad_norm"], found["learning_rate"]) == ("nan", 1e30)
    assert len(found["micro_batch_losses"]) == 2


def test_no_update_opens_the_data_anew(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    sequences = TokenStore.sequences

    def noted(self: TokenStore, name: Split, context_length: int) -> Sequences:
        opened.append(name)
        return sequences(self, name, context_length)

    monkeypatch.setattr(TokenStore, "sequences", noted)
    fit(tiny_run(tmp_path / "run", rungs=(8,)), store)
    assert opened.count("train") == 2, "to see whether it fits, and to train"


def test_a_limit_of_none_stops_at_the_first(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), max_skipped_steps=0)
    with spoiled(3), pytest.raises(UserError, match=r"step 4: .*\. 1 updates in a row were"):
        fit(run, store)


def test_a_validation_loss_that_is_not_finite_stops_the_run(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = wild(tiny_run(tmp_path / "run", rungs=(8,)))
    with pytest.raises(UserError, match=r"stage n8, step 3: the validation loss is not finite"):
        fit(run, store)
    assert not list((tmp_path / "run").glob("step_*"))


@pytest.mark.parametrize("growth", [GrowthConfig(), GrowthConfig(freeze_source=3)])
def test_killed_run_with_skipped_updates_resumes_bit_identically(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, growth: GrowthConfig
) -> None:
    def run(name: str) -> TrainConfig:
        return tiny_run(tmp_path / name, rungs=(8, 12), growth=growth, checkpoint_every=2)

    with spoiled(3, 6, 7):  # the last two are the first of the second stage
        whole = fit(run("whole"), store)
    with spoiled(3, 6, 7), killed_at(8):
        fit(run("killed"), store)
    assert same_bits(fit(run("killed"), store), whole)


def test_checkpoints_from_before_updates_were_counted_go_on(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    values = fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store).state.to_dict()
    del values["skipped_in_a_row"], values["rungs"][0]["skipped"]
    state = TrainState.from_dict(values)
    assert (state.rung.skipped, state.skipped_in_a_row, state.stage_updates) == (0, 0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_ran_ahead_saves_nothing_past_the_limit(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    fabric = FabricConfig(accelerator="cuda")
    run = wild(tiny_run(tmp_path / "run", rungs=(8,), steps=40, fabric=fabric), log_every=20)
    run = replace(run, validation_every=100, checkpoint_every=20)
    with pytest.raises(UserError, match=r"stage n8, step 1[23]: .* 11 updates in a row"):
        fit(run, store)
    assert not list((tmp_path / "run").glob("step_*"))
