"""Optimizer state as flat named tensors: collected, loaded, and refused."""

from collections.abc import Callable

import pytest
import torch

from tokengrow.errors import UserError
from tokengrow.growth.moments import COLUMN_AGE, ROW_AGE
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.state import collect_optimizer_state, load_optimizer_state


def update(model: TokenFormer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take one update on random token ids."""
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(ids[:, :-1], targets=ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_next_update_after_loading_has_the_same_bits(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    for seed in range(3):
        update(model, optimizer, seed)
    copy = TokenFormer.from_weights(model.config, model.state_dict())
    copy_optimizer = build_optimizer(copy, OptimConfig())
    load_optimizer_state(copy, copy_optimizer, collect_optimizer_state(model, optimizer))
    update(model, optimizer, 3)
    update(copy, copy_optimizer, 3)
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_loaded_state_is_a_copy(tiny_model: Callable[..., ModelConfig]) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    update(model, optimizer, 0)
    state = {
        name: tensor.clone() for name, tensor in collect_optimizer_state(model, optimizer).items()
    }
    kept = {name: tensor.clone() for name, tensor in state.items()}
    load_optimizer_state(model, optimizer, state)
    update(model, optimizer, 1)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_keys_are_slot_and_parameter_name(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    assert collect_optimizer_state(model, optimizer) == {}
    update(model, optimizer, 0)
    state = collect_optimizer_state(model, optimizer)
    assert state["step.final_norm.bias"] == 1
    weights = model.state_dict()
    for slot in ("exp_avg", "exp_avg_sq"):
        assert all(state[f"{slot}.{name}"].shape == weights[name].shape for name in weights)


def test_state_of_another_model_is_refused(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    update(model, optimizer, 0)
    state = collect_optimizer_state(model, optimizer)
    del state["exp_avg.embedding.weight"]
    with pytest.raises(UserError, match=r"exp_avg\.embedding\.weight is missing"):
        load_optimizer_state(model, optimizer, state)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("exp_avg.final_norm.bias", [3], r"must have shape \[32\], got \[3\]\. .*another model"),
        (f"{COLUMN_AGE}.embedding.weight", [3], r"must have shape \[32\], got \[3\]"),
        (f"{ROW_AGE}.embedding.weight", [512], r"column_age\.embedding\.weight is missing"),
    ],
)
def test_wrong_shape_or_missing_age_is_refused(
    tiny_model: Callable[..., ModelConfig], key: str, shape: list[int], message: str
) -> None:
    model = TokenFormer(tiny_model())
    optimizer = build_optimizer(model, OptimConfig())
    with pytest.raises(UserError, match=message):
        load_optimizer_state(model, optimizer, {key: torch.zeros(shape)})
