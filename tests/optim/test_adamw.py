"""AdamW with ages: new entries as in a fresh optimizer, old ones as in the old optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.adamw import AgedAdamW, Ages
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.state import collect_optimizer_state, load_optimizer_state

LR, DECAY = 1e-2, 0.1
OLD, NEW = (slice(0, 3), slice(0, 4)), 5  # 3 x 4 old entries of 5 x 6; rows and columns are new
NO_WARMUP = GrowthConfig(new_warmup_steps=0)
BETAS = [(0.9, 0.95), (0.9, 0.999)]


def gradients(seed: int, count: int) -> list[Tensor]:
    """Draw gradients of a 5 x 6 parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(count)]


def adamw(parameter: nn.Parameter, kind: type = torch.optim.AdamW, **settings: Any) -> Any:
    """Build an optimizer of one parameter."""
    group = {"params": [parameter], "weight_decay": DECAY}
    return kind([group], lr=LR, **settings)


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[Tensor]) -> None:
    """Take one update with each gradient."""
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()


def aged(
    betas: tuple[float, float], past: list[Tensor], growth: GrowthConfig = NO_WARMUP
) -> tuple[nn.Parameter, AgedAdamW, torch.optim.AdamW]:
    """Build a 5 x 6 parameter of which only the 3 x 4 corner had updates.

    Returns:
        The parameter, its optimizer, and the optimizer of the corner before the growth.
    """
    start = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    corner = nn.Parameter(start[OLD].clone())
    corner_optimizer = adamw(corner, betas=betas)
    run(corner_optimizer, corner, [gradient[OLD] for gradient in past])
    parameter = nn.Parameter(start)
    optimizer = adamw(parameter, AgedAdamW, betas=betas)
    with torch.no_grad():
        parameter[OLD] = corner
    if past:
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(len(past)))
        for slot in ("exp_avg", "exp_avg_sq"):
            state[slot] = torch.zeros_like(parameter)
            state[slot][OLD] = corner_optimizer.state[corner][slot]
    rows = torch.tensor([len(past)] * 3 + [0] * 2)
    columns = torch.tensor([len(past)] * 4 + [0] * 2)
    optimizer.set_ages({parameter: Ages(rows, columns)})
    optimizer.begin_stage(growth, updates_done=0)
    return parameter, optimizer, corner_optimizer


@pytest.mark.parametrize("betas", BETAS)
def test_entries_move_as_in_separate_optimizers(
    betas: tuple[float, float],
) -> None:
    parameter, optimizer, corner_optimizer = aged(betas, gradients(1, 30))
    corner = corner_optimizer.param_groups[0]["params"][0]
    fresh = nn.Parameter(parameter.detach().clone())
    fresh_optimizer = adamw(fresh, betas=betas)
    ahead = gradients(2, 12)
    run(optimizer, parameter, ahead)
    run(corner_optimizer, corner, [gradient[OLD] for gradient in ahead])
    run(fresh_optimizer, fresh, ahead)
    expected = fresh.detach().clone()
    expected[OLD] = corner.detach()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_parameters_move_as_in_optimizers_of_their_own() -> None:
    # Update factors are computed once for equal ages, so there are three parameters of two ages.
    pasts = [gradients(1, 30), gradients(1, 30), gradients(1, 7)]
    separate = [aged((0.9, 0.95), past) for past in pasts]
    joint = [aged((0.9, 0.95), past) for past in pasts]
    together = AgedAdamW(
        [{"params": [parameter for parameter, _, _ in joint], "weight_decay": DECAY}],
        lr=LR,
        betas=(0.9, 0.95),
    )
    for parameter, optimizer, _ in joint:
        together.state[parameter] = optimizer.state[parameter]
    together.set_ages({parameter: optimizer.ages()[parameter] for parameter, optimizer, _ in joint})
    together.begin_stage(NO_WARMUP, updates_done=0)
    for gradient in gradients(2, 12):
        for parameter, optimizer, _ in separate:
            run(optimizer, parameter, [gradient])
        for parameter, _, _ in joint:
            parameter.grad = gradient.clone()
        together.step()
    for (expected, _, _), (found, _, _) in zip(separate, joint, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("betas", BETAS)
def test_without_ages_first_update_of_new_entry_is_scaled(
    betas: tuple[float, float],
) -> None:
    # Ages avoid this: (1 - b1) / sqrt(1 - b2) of the rate, 0.45 and 3.2, instead of 1.
    parameter, optimizer, _ = aged(betas, gradients(1, 3000))
    optimizer.set_ages({})
    before = parameter.detach().clone()
    run(optimizer, parameter, gradients(2, 1))
    moved = (parameter.detach() - before * (1 - LR * DECAY))[4, 5].abs().item() / LR
    assert moved == pytest.approx((1 - betas[0]) / (1 - betas[1]) ** 0.5, rel=0.05)


def test_without_ages_it_equals_torch_adamw() -> None:
    start = gradients(3, 1)[0]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(adamw(ours, AgedAdamW), ours, gradients(4, 5))
    run(adamw(theirs), theirs, gradients(4, 5))
    assert torch.equal(ours, theirs)


def test_with_old_entries_it_equals_torch_adamw() -> None:
    # 0.95 ** 325 is below the rounding error of float32.
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 30))
    run(optimizer, parameter, gradients(2, 325))
    theirs = nn.Parameter(parameter.detach().clone())
    their_optimizer = adamw(theirs, betas=(0.9, 0.95))
    their_optimizer.state[theirs] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    run(optimizer, parameter, gradients(3, 1))
    run(their_optimizer, theirs, gradients(3, 1))
    assert torch.equal(parameter, theirs)


def test_learning_rate_of_new_entries_warms_up() -> None:
    growth = GrowthConfig(new_lr_scale=0.5, new_warmup_steps=4)
    parameter, optimizer, corner_optimizer = aged((0.9, 0.95), gradients(1, 30), growth)
    corner = corner_optimizer.param_groups[0]["params"][0]
    fresh = nn.Parameter(parameter.detach().clone())
    fresh_optimizer = adamw(fresh, betas=(0.9, 0.95))
    for update, gradient in enumerate(gradients(2, 6)):
        fresh_optimizer.param_groups[0]["lr"] = LR * 0.5 * [0.25, 0.5, 0.75, 1.0, 1.0, 1.0][update]
        run(fresh_optimizer, fresh, [gradient])
        run(optimizer, parameter, [gradient])
        run(corner_optimizer, corner, [gradient[OLD]])
    expected = fresh.detach().clone()
    expected[OLD] = corner.detach()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("freeze", [4, -1])
def test_frozen_entries_and_moments_are_bitwise_unchanged(freeze: int) -> None:
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=freeze)
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 30), growth)
    tensors = [parameter, *(optimizer.state[parameter][slot] for slot in ("exp_avg", "exp_avg_sq"))]
    before = [tensor.detach().clone() for tensor in tensors]
    run(optimizer, parameter, gradients(2, 4))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[OLD], old[OLD])
        moved = tensor != old
        moved[OLD] = True
        assert moved.all()


def test_frozen_entries_continue_as_before_the_freeze() -> None:
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=4)
    parameter, optimizer, corner_optimizer = aged((0.9, 0.95), gradients(1, 5), growth)
    corner = corner_optimizer.param_groups[0]["params"][0]
    run(optimizer, parameter, gradients(2, 4))
    ahead = gradients(3, 3)
    run(optimizer, parameter, ahead)
    run(corner_optimizer, corner, [gradient[OLD] for gradient in ahead])
    torch.testing.assert_close(parameter[OLD].detach(), corner.detach(), rtol=1e-12, atol=1e-14)


def test_gradients_of_frozen_entries_are_zeroed() -> None:
    growth = GrowthConfig(freeze_source=1)
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 5), growth)
    parameter.grad = torch.ones(5, 6, dtype=torch.float64)
    optimizer.zero_frozen_gradients()
    assert parameter.grad.sum() == 30 - 12
    assert (parameter.grad[OLD] == 0).all()
    optimizer.step()
    parameter.grad = torch.ones(5, 6, dtype=torch.float64)
    optimizer.zero_frozen_gradients()
    assert parameter.grad.sum() == 30


def test_nothing_is_frozen_in_a_stage_without_growth() -> None:
    growth = GrowthConfig(freeze_source=-1)
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 5))
    run(optimizer, parameter, gradients(2, 3))  # stage of the growth
    optimizer.set_ages(optimizer.ages())
    optimizer.begin_stage(growth, updates_done=0)
    before = parameter.detach().clone()
    run(optimizer, parameter, gradients(3, 1))
    assert (parameter != before).all()


def test_closure_is_called_once_with_gradients() -> None:
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 5))
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    assert (parameter != before).all()


@pytest.mark.parametrize("freeze", [0, 5])
def test_ages_survive_a_checkpoint_within_a_warmup(
    tiny_model: Callable[..., ModelConfig], freeze: int
) -> None:
    growth = GrowthConfig(new_warmup_steps=6, new_lr_scale=2.0, freeze_source=freeze)
    model = TokenFormer(tiny_model(8))
    optimizer = build_optimizer(model, OptimConfig())
    train(model, optimizer, 3)
    ages = {p: Ages(*(torch.full([n], 3.0) for n in p.shape)) for p in model.parameters()}
    key = model.blocks[0].ffn.key_param_tokens
    rows = torch.tensor([3.0] * 10 + [0.0] * 6)
    ages[key] = Ages(rows, torch.full([32], 3.0))
    optimizer.set_ages(ages)
    optimizer.begin_stage(growth, updates_done=0)
    train(model, optimizer, 4)

    again = TokenFormer.from_weights(model.config, model.to_weights()).train()
    resumed = build_optimizer(again, OptimConfig())
    load_optimizer_state(again, resumed, collect_optimizer_state(model, optimizer))
    resumed.begin_stage(growth, updates_done=4)
    train(model, optimizer, 4)
    train(again, resumed, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    one, other = collect_optimizer_state(model, optimizer), collect_optimizer_state(again, resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one["row_age.blocks.0.ffn.key_param_tokens"].tolist() == [11.0] * 10 + [8.0] * 6


def train(model: TokenFormer, optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Train a model for some updates on fixed ids."""
    ids = torch.arange(64).view(2, 32)
    for _ in range(updates):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def test_entries_after_a_long_freeze() -> None:
    # More than the updates (325 at 0.95) after which a bias correction has no effect.
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=330)
    parameter, optimizer, _ = aged((0.9, 0.95), [], growth)
    optimizer.set_ages({parameter: Ages(torch.tensor([1] * 3 + [0] * 2), torch.tensor([1] * 6))})
    optimizer.begin_stage(growth, updates_done=0)
    fresh = nn.Parameter(parameter.detach().clone())
    fresh_optimizer = adamw(fresh, betas=(0.9, 0.95))
    frozen, unfrozen = gradients(2, 330), gradients(3, 5)
    run(optimizer, parameter, frozen + unfrozen)
    run(fresh_optimizer, fresh, frozen + unfrozen)
    torch.testing.assert_close(parameter[3:].detach(), fresh[3:].detach(), rtol=1e-9, atol=1e-12)
    # The frozen rows, which had no moments, start at the end of the freeze.
    old = nn.Parameter(aged((0.9, 0.95), [])[0].detach()[:3].clone())
    old_optimizer = adamw(old, betas=(0.9, 0.95))
    run(old_optimizer, old, [gradient[:3] for gradient in unfrozen])
    torch.testing.assert_close(parameter[:3].detach(), old.detach(), rtol=1e-9, atol=1e-12)


def test_new_entries_continue_after_a_frozen_stage() -> None:
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=-1)
    parameter, optimizer, _ = aged((0.9, 0.95), [], growth)
    fresh = nn.Parameter(parameter.detach().clone())
    fresh_optimizer = adamw(fresh, betas=(0.9, 0.95))
    optimizer.set_ages({parameter: Ages(torch.tensor([1] * 3 + [0] * 2), torch.tensor([1] * 6))})
    optimizer.begin_stage(growth, updates_done=0)
    steps = gradients(2, 40)
    run(optimizer, parameter, steps[:30])
    optimizer.set_ages(optimizer.ages())
    optimizer.begin_stage(GrowthConfig(), updates_done=0)
    run(optimizer, parameter, steps[30:])
    run(fresh_optimizer, fresh, steps)
    torch.testing.assert_close(parameter[3:].detach(), fresh[3:].detach(), rtol=1e-9, atol=1e-12)


def test_set_ages_resets_skipped_updates() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = adamw(parameter, AgedAdamW, fused=True)
    optimizer.set_ages({parameter: Ages(torch.full([2], 1e4), torch.full([3], 1e4))})
    for _ in range(2):
        parameter.grad = torch.ones(2, 3)
        optimizer.skip_if(torch.tensor(1.0))
        optimizer.step()
        assert optimizer.ages()[parameter].rows.tolist() == [1e4] * 2
        optimizer.set_ages(optimizer.ages())
    assert optimizer.ages()[parameter].rows.tolist() == [1e4] * 2
