"""AdamW by the age of each entry: new ones as in a fresh optimizer, old ones as in the old one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.adamw import AgedAdamW, Ages
from tokengrow.optim.config import (
    OptimConfig,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
)

LR, DECAY = 1e-2, 0.1
OLD, NEW = (slice(0, 3), slice(0, 4)), 5  # 3 x 4 old entries of 5 x 6; rows and columns are new
NO_WARMUP = GrowthConfig(new_warmup_steps=0)
BETAS = [(0.9, 0.95), (0.9, 0.999)]


def gradients(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(count)]


def adamw(parameter: nn.Parameter, kind: type = torch.optim.AdamW, **settings: Any) -> Any:
    group = {"params": [parameter], "weight_decay": DECAY}
    return kind([group], lr=LR, **settings)


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[Tensor]) -> None:
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()


def aged(
    betas: tuple[float, float], past: list[Tensor], growth: GrowthConfig = NO_WARMUP
) -> tuple[nn.Parameter, AgedAdamW, torch.optim.AdamW]:
    """A 5 x 6 parameter whose 3 x 4 corner has had updates, the rest none; beside it the optimizer
    of the corner, as it was."""
    start = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    corner = nn.Parameter(start[OLD].clone())
    of_corner = adamw(corner, betas=betas)
    run(of_corner, corner, [gradient[OLD] for gradient in past])
    parameter = nn.Parameter(start)
    optimizer = adamw(parameter, AgedAdamW, betas=betas)
    with torch.no_grad():
        parameter[OLD] = corner
    if past:
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(len(past)))
        for slot in ("exp_avg", "exp_avg_sq"):
            state[slot] = torch.zeros_like(parameter)
            state[slot][OLD] = of_corner.state[corner][slot]
    rows = torch.tensor([len(past)] * 3 + [0] * 2)
    columns = torch.tensor([len(past)] * 4 + [0] * 2)
    optimizer.set_ages({parameter: Ages(rows, columns)})
    optimizer.begin_stage(growth, done=0)
    return parameter, optimizer, of_corner


@pytest.mark.parametrize("betas", BETAS)
def test_old_entries_go_on_and_new_ones_begin_as_in_optimizers_of_their_own(
    betas: tuple[float, float],
) -> None:
    parameter, optimizer, of_corner = aged(betas, gradients(1, 30))
    corner = of_corner.param_groups[0]["params"][0]
    fresh = nn.Parameter(parameter.detach().clone())
    of_fresh = adamw(fresh, betas=betas)
    ahead = gradients(2, 12)
    run(optimizer, parameter, ahead)
    run(of_corner, corner, [gradient[OLD] for gradient in ahead])
    run(of_fresh, fresh, ahead)
    expected = fresh.detach().clone()
    expected[OLD] = corner.detach()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_parameters_side_by_side_move_as_each_would_alone() -> None:
    # What follows from ages is worked out once for those alike, so here are three of two kinds.
    pasts = [gradients(1, 30), gradients(1, 30), gradients(1, 7)]
    alone = [aged((0.9, 0.95), past) for past in pasts]
    beside = [aged((0.9, 0.95), past) for past in pasts]
    together = AgedAdamW(
        [{"params": [parameter for parameter, _, _ in beside], "weight_decay": DECAY}],
        lr=LR,
        betas=(0.9, 0.95),
    )
    for parameter, optimizer, _ in beside:
        together.state[parameter] = optimizer.state[parameter]
    together.set_ages(
        {parameter: optimizer.ages()[parameter] for parameter, optimizer, _ in beside}
    )
    together.begin_stage(NO_WARMUP, done=0)
    for gradient in gradients(2, 12):
        for parameter, optimizer, _ in alone:
            run(optimizer, parameter, [gradient])
        for parameter, _, _ in beside:
            parameter.grad = gradient.clone()
        together.step()
    for (expected, _, _), (found, _, _) in zip(alone, beside, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("betas", BETAS)
def test_with_one_count_for_all_the_first_update_of_a_new_entry_would_be_another(
    betas: tuple[float, float],
) -> None:
    # What ages are for: (1 - b1) / sqrt(1 - b2) of the rate, 0.45 and 3.2, in place of 1.
    parameter, optimizer, _ = aged(betas, gradients(1, 3000))
    optimizer.set_ages({})
    before = parameter.detach().clone()
    run(optimizer, parameter, gradients(2, 1))
    moved = (parameter.detach() - before * (1 - LR * DECAY))[4, 5].abs().item() / LR
    assert moved == pytest.approx((1 - betas[0]) / (1 - betas[1]) ** 0.5, rel=0.05)


def test_without_ages_it_is_torchs() -> None:
    start = gradients(3, 1)[0]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(adamw(ours, AgedAdamW), ours, gradients(4, 5))
    run(adamw(theirs), theirs, gradients(4, 5))
    assert torch.equal(ours, theirs)


def test_once_new_entries_are_old_it_is_torchs_again() -> None:
    # 0.95 ** 325 is less than what float32 can tell from 0.
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 30))
    run(optimizer, parameter, gradients(2, 325))
    theirs = nn.Parameter(parameter.detach().clone())
    of_theirs = adamw(theirs, betas=(0.9, 0.95))
    of_theirs.state[theirs] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    run(optimizer, parameter, gradients(3, 1))
    run(of_theirs, theirs, gradients(3, 1))
    assert torch.equal(parameter, theirs)


def test_the_rate_of_new_entries_warms_up_by_itself() -> None:
    growth = GrowthConfig(new_lr_scale=0.5, new_warmup_steps=4)
    parameter, optimizer, of_corner = aged((0.9, 0.95), gradients(1, 30), growth)
    corner = of_corner.param_groups[0]["params"][0]
    fresh = nn.Parameter(parameter.detach().clone())
    of_fresh = adamw(fresh, betas=(0.9, 0.95))
    for update, gradient in enumerate(gradients(2, 6)):
        of_fresh.param_groups[0]["lr"] = LR * 0.5 * [0.25, 0.5, 0.75, 1.0, 1.0, 1.0][update]
        run(of_fresh, fresh, [gradient])
        run(optimizer, parameter, [gradient])
        run(of_corner, corner, [gradient[OLD]])
    expected = fresh.detach().clone()
    expected[OLD] = corner.detach()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("freeze", [4, -1])
def test_frozen_entries_and_their_moments_keep_every_bit(freeze: int) -> None:
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


def test_what_was_frozen_goes_on_as_if_nothing_had_been() -> None:
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=4)
    parameter, optimizer, of_corner = aged((0.9, 0.95), gradients(1, 5), growth)
    corner = of_corner.param_groups[0]["params"][0]
    run(optimizer, parameter, gradients(2, 4))
    ahead = gradients(3, 3)
    run(optimizer, parameter, ahead)
    run(of_corner, corner, [gradient[OLD] for gradient in ahead])
    torch.testing.assert_close(parameter[OLD].detach(), corner.detach(), rtol=1e-12, atol=1e-14)


def test_gradients_of_frozen_entries_are_dropped_before_clipping() -> None:
    growth = GrowthConfig(freeze_source=1)
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 5), growth)
    parameter.grad = torch.ones(5, 6, dtype=torch.float64)
    optimizer.drop_frozen_gradients()
    assert parameter.grad.sum() == 30 - 12
    assert (parameter.grad[OLD] == 0).all()
    optimizer.step()
    parameter.grad = torch.ones(5, 6, dtype=torch.float64)
    optimizer.drop_frozen_gradients()
    assert parameter.grad.sum() == 30


def test_nothing_is_frozen_in_a_stage_that_did_not_begin_with_a_growth() -> None:
    growth = GrowthConfig(freeze_source=-1)
    parameter, optimizer, _ = aged((0.9, 0.95), gradients(1, 5))
    run(optimizer, parameter, gradients(2, 3))  # the stage of the growth
    optimizer.set_ages(optimizer.ages())
    optimizer.begin_stage(growth, done=0)
    before = parameter.detach().clone()
    run(optimizer, parameter, gradients(3, 1))
    assert (parameter != before).all()


def test_a_closure_is_called_once_and_with_gradients() -> None:
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
def test_ages_survive_a_checkpoint_in_the_middle_of_a_warm_up(
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
    optimizer.begin_stage(growth, done=0)
    train(model, optimizer, 4)

    again = TokenFormer.from_weights(model.config, model.to_weights()).train()
    resumed = build_optimizer(again, OptimConfig())
    load_optimizer_state(again, resumed, optimizer_state(model, optimizer))
    resumed.begin_stage(growth, done=4)
    train(model, optimizer, 4)
    train(again, resumed, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    one, other = optimizer_state(model, optimizer), optimizer_state(again, resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one["row_age.blocks.0.ffn.key_param_tokens"].tolist() == [11.0] * 10 + [8.0] * 6


def train(model: TokenFormer, optimizer: torch.optim.Optimizer, updates: int) -> None:
    ids = torch.arange(64).view(2, 32)
    for _ in range(updates):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def test_new_entries_go_on_as_in_an_optimizer_of_their_own_after_a_long_freeze() -> None:
    # Past the updates (325 at 0.95) after which nothing new is left for a bias correction to tell.
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=330)
    parameter, optimizer, _ = aged((0.9, 0.95), [], growth)
    optimizer.set_ages({parameter: Ages(torch.tensor([1] * 3 + [0] * 2), torch.tensor([1] * 6))})
    optimizer.begin_stage(growth, done=0)
    fresh = nn.Parameter(parameter.detach().clone())
    of_fresh = adamw(fresh, betas=(0.9, 0.95))
    frozen, thawed = gradients(2, 330), gradients(3, 5)
    run(optimizer, parameter, frozen + thawed)
    run(of_fresh, fresh, frozen + thawed)
    torch.testing.assert_close(parameter[3:].detach(), fresh[3:].detach(), rtol=1e-9, atol=1e-12)
    # The frozen rows, which had no moments, begin at the thaw.
    old = nn.Parameter(aged((0.9, 0.95), [])[0].detach()[:3].clone())
    of_old = adamw(old, betas=(0.9, 0.95))
    run(of_old, old, [gradient[:3] for gradient in thawed])
    torch.testing.assert_close(parameter[:3].detach(), old.detach(), rtol=1e-9, atol=1e-12)


def test_what_grew_beside_a_frozen_source_goes_on_in_the_next_stage() -> None:
    growth = GrowthConfig(new_warmup_steps=0, freeze_source=-1)
    parameter, optimizer, _ = aged((0.9, 0.95), [], growth)
    fresh = nn.Parameter(parameter.detach().clone())
    of_fresh = adamw(fresh, betas=(0.9, 0.95))
    optimizer.set_ages({parameter: Ages(torch.tensor([1] * 3 + [0] * 2), torch.tensor([1] * 6))})
    optimizer.begin_stage(growth, done=0)
    steps = gradients(2, 40)
    run(optimizer, parameter, steps[:30])
    optimizer.set_ages(optimizer.ages())
    optimizer.begin_stage(GrowthConfig(), done=0)
    run(optimizer, parameter, steps[30:])
    run(of_fresh, fresh, steps)
    torch.testing.assert_close(parameter[3:].detach(), fresh[3:].detach(), rtol=1e-9, atol=1e-12)
