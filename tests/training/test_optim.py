"""The learning rate worked by hand, what decays, and Adam's state on its way to the disk and
back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.module import next_token_loss
from tokengrow.training.optim import (
    OptimConfig,
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "F_learning_rate.json").read_text())["schedules"]
COSINE = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4)


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (1, 0.25),  # lr / warmup_steps
        (2, 0.5),
        (4, 1.0),  # the peak
        (6, 0.2 + 0.8 * (2 + 2**0.5) / 4),  # a quarter of the way down: (1 + cos 45°) / 2
        (8, 0.6),  # half-way: (lr + min_lr) / 2
        (12, 0.2),  # the last update
        (13, 0.2),  # and whatever comes after
    ],
)
def test_a_cosine_stage_of_twelve_updates(update: int, rate: float) -> None:
    assert learning_rate(COSINE, update, updates=12) == pytest.approx(rate, rel=1e-12)


def test_a_constant_stage_stays_at_its_peak() -> None:
    config = OptimConfig(lr=0.5, warmup_steps=2, schedule="constant")
    rates = [learning_rate(config, update, updates=5) for update in range(1, 6)]
    assert rates == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_a_stage_without_warmup_begins_below_its_peak_and_ends_at_min_lr() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)
    assert learning_rate(config, 1, updates=2) == pytest.approx(0.5)
    assert learning_rate(config, 2, updates=2) == pytest.approx(0.0)


def test_a_cosine_may_end_before_its_stage() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, decay_steps=12)
    for update in range(1, 13):
        assert learning_rate(config, update, updates=100) == learning_rate(COSINE, update, 12)
    assert learning_rate(config, 50, updates=100) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", PUBLISHED, ids=lambda s: f"{s['train_iters']}")
def test_the_published_schedule_at_every_published_point(schedule: dict[str, Any]) -> None:
    config = OptimConfig(
        lr=schedule["lr"],
        min_lr=schedule["min_lr"],
        warmup_steps=schedule["warmup_iter"],
        schedule="neox_cosine",
    )
    assert len(schedule["points"]) == 202
    for done, rate in schedule["points"]:  # also past the end, where the cosine rises again
        found = learning_rate(config, done + 1, schedule["lr_decay_iters"])
        assert found == pytest.approx(rate, rel=1e-12, abs=0)


def test_the_published_warm_up_may_end_between_two_updates() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=1.5, schedule="neox_cosine")
    rates = [learning_rate(config, update, updates=6) for update in (1, 2, 3)]
    # 0 and 1 updates done: 0 / 1.5 and 1 / 1.5; then 0.5 of 4.5 updates down: (1 + cos 20°) / 2
    assert rates == pytest.approx([0.0, 2 / 3, (1 + 0.9396926207859084) / 2], rel=1e-12)


def test_everything_but_the_final_norm_decays(tiny_model: Callable[..., ModelConfig]) -> None:
    model = TokenFormer(tiny_model())
    decayed, undecayed = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert undecayed["weight_decay"] == 0.0
    assert {names[p] for p in undecayed["params"]} == {"final_norm.weight", "final_norm.bias"}
    assert len(decayed["params"]) == 1 + 2 * 5 * 2  # embedding, 2 layers of 5 roles, key and value


def update(model: TokenFormer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on random token ids."""
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(seed))
    next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_after_a_round_trip_the_next_step_has_the_same_bits(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    for seed in range(3):
        update(model, optimizer, seed)
    twin = TokenFormer.from_weights(model.config, model.state_dict())
    twins_optimizer = build_optimizer(twin, OptimConfig())
    load_optimizer_state(twin, twins_optimizer, optimizer_state(model, optimizer))
    update(model, optimizer, 3)
    update(twin, twins_optimizer, 3)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_loaded_state_is_a_copy(tiny_model: Callable[..., ModelConfig]) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    update(model, optimizer, 0)
    state = {name: tensor.clone() for name, tensor in optimizer_state(model, optimizer).items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    load_optimizer_state(model, optimizer, state)
    update(model, optimizer, 1)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_state_is_named_by_slot_and_parameter_and_empty_at_first(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    assert optimizer_state(model, optimizer) == {}
    update(model, optimizer, 0)
    state = optimizer_state(model, optimizer)
    assert state["step.final_norm.bias"] == 1
    weights = model.state_dict()
    for slot in ("exp_avg", "exp_avg_sq"):
        assert all(state[f"{slot}.{name}"].shape == weights[name].shape for name in weights)


def test_state_of_another_model_is_refused_by_name(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    update(model, optimizer, 0)
    state = optimizer_state(model, optimizer)
    del state["exp_avg.embedding.weight"]
    with pytest.raises(UserError, match=r"exp_avg\.embedding\.weight"):
        load_optimizer_state(model, optimizer, state)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lr": 0.0}, "optim.lr"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "optim.min_lr"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"eps": 0.0}, "optim.eps"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"grad_clip": 0.0}, "optim.grad_clip"),
        ({"decay_steps": 100, "warmup_steps": 100}, r"optim.decay_steps.*warmup_steps \(100\)"),
        ({"schedule": "linear"}, "optim.schedule.*cosine, constant"),
    ],
)
def test_a_refused_setting_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OptimConfig(**setting)


def test_a_constant_stage_does_not_mind_a_min_lr_above_its_rate() -> None:
    assert OptimConfig(lr=1e-5, min_lr=6e-5, schedule="constant").lr == 1e-5
