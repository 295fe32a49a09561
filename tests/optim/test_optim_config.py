"""What decays, Adam's state on its way to the disk and back, and settings that are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import (
    OptimConfig,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
)


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
    model(ids[:, :-1], targets=ids[:, 1:]).backward()
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
        ({"grad_clip": 0.0}, "optim.grad_clip.*above 0"),
        ({"decay_steps": 100, "warmup_steps": 100}, r"optim.decay_steps.*warmup_steps \(100\)"),
        ({"decay_steps": 100, "schedule": "wsd"}, "optim.decay_steps.*give decay_share"),
        ({"decay_share": 0.0}, "optim.decay_share.*above 0 and at most 1"),
        ({"decay_share": 1.5}, "optim.decay_share"),
        ({"schedule": "linear"}, "optim.schedule.*cosine, constant"),
        ({"enter": "warm"}, "optim.enter.*rewarm, continue, peak"),
    ],
)
def test_a_refused_setting_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OptimConfig(**setting)


def test_a_constant_stage_does_not_mind_a_min_lr_above_its_rate() -> None:
    assert OptimConfig(lr=1e-5, min_lr=6e-5, schedule="constant").lr == 1e-5


def test_a_decay_may_be_shorter_than_a_warm_up_that_is_not_there() -> None:
    assert OptimConfig(decay_steps=100, warmup_steps=100, enter="peak").warmup == 0
