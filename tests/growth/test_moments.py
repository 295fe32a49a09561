"""Optimizer state through a growth: old entries continue as without it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.engine import AppliedGrowth, apply_growth
from tokengrow.growth.moments import ADAM_SLOTS, COLUMN_AGE, ROW_AGE, grow_optimizer_state
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.tokens import token_tensors
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig, build_optimizer
from tokengrow.optim.state import collect_optimizer_state, load_optimizer_state

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]
OPTIM = OptimConfig(lr=1e-3)
BATCH = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(5))


def update(model: TokenFormer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Train for one update on the batch and return the change of each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    F.cross_entropy(model(BATCH[:, :-1]).flatten(0, 1), BATCH[:, 1:].flatten()).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.fixture
def trained(random_model: RandomModel, sized: Sized) -> tuple[TokenFormer, torch.optim.Optimizer]:
    """float64 model and its optimizer after five updates."""
    model = random_model(sized(6)).train()
    optimizer = build_optimizer(model, OPTIM)
    for _ in range(5):
        update(model, optimizer)
    return model, optimizer


def grown_from(
    model: TokenFormer, optimizer: torch.optim.Optimizer, to: ModelConfig
) -> AppliedGrowth:
    """Grow the model and its optimizer state to a larger config."""
    plan = plan_growth(model.config, to)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return apply_growth(plan, weights, collect_optimizer_state(model, optimizer))


def resumed(grown: AppliedGrowth) -> tuple[TokenFormer, torch.optim.Optimizer]:
    """Return the grown model with an optimizer that loaded the grown state."""
    model = TokenFormer.from_weights(grown.config, grown.weights).train()
    optimizer = build_optimizer(model, OPTIM)
    load_optimizer_state(model, optimizer, grown.optimizer)
    return model, optimizer


def test_next_update_of_old_entries_is_that_of_the_source(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    larger = resumed(grown_from(*trained, sized(10)))
    moved, moved_larger = update(*trained), update(*larger)
    for name, step in moved.items():
        assert step.abs().max() > 0
        old = moved_larger[name][: len(step)]
        torch.testing.assert_close(old, step, rtol=1e-6, atol=1e-6 * OPTIM.lr)


def test_fresh_optimizer_moves_old_entries_differently(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    # Moments are carried to avoid this difference.
    grown = grown_from(*trained, sized(10))
    fresh = TokenFormer.from_weights(grown.config, grown.weights).train()
    moved, moved_fresh = update(*trained), update(fresh, build_optimizer(fresh, OPTIM))
    difference = (moved["embedding.weight"] - moved_fresh["embedding.weight"]).abs().max()
    assert difference.item() > 0.1 * OPTIM.lr


def test_grown_state_is_complete_and_shaped_like_parameters(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    grown = grown_from(*trained, sized(10))
    wanted = {f"{slot}.{name}" for slot in (*ADAM_SLOTS, ROW_AGE) for name in grown.weights}
    wanted |= {f"{COLUMN_AGE}.{name}" for name, w in grown.weights.items() if w.dim() == 2}
    assert set(grown.optimizer) == wanted
    for name, weights in grown.weights.items():
        assert grown.optimizer[f"exp_avg.{name}"].shape == weights.shape
        assert grown.optimizer[f"exp_avg_sq.{name}"].shape == weights.shape
        assert grown.optimizer[f"exp_avg.{name}"].dtype == weights.dtype


def test_old_moments_stay_and_new_ones_are_zero(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    source = {name: t.clone() for name, t in collect_optimizer_state(*trained).items()}
    grown = grown_from(*trained, sized(10)).optimizer
    growing = token_tensors(trained[0].config)
    for key, old in source.items():
        slot, _, name = key.partition(".")
        if slot == "step":
            assert grown[key].item() == old.item() == 5
            continue
        assert torch.equal(grown[key][: len(old)], old)
        assert bool((grown[key][len(old) :] == 0).all())
        assert (len(grown[key]) > len(old)) == (name in growing)


def test_source_state_is_not_modified(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    state = collect_optimizer_state(*trained)
    before = {key: tensor.clone() for key, tensor in state.items()}
    plan = plan_growth(trained[0].config, sized(10))
    weights = {name: tensor.clone() for name, tensor in trained[0].state_dict().items()}
    larger = resumed(apply_growth(plan, weights, state))
    update(*larger)  # training the grown model does not modify it either
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())


def test_plan_without_steps_keeps_the_state(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    state = collect_optimizer_state(*trained)
    same = dict(grow_optimizer_state(plan_growth(sized(6), sized(6)), state))
    assert same.keys() == state.keys()
    assert all(torch.equal(same[key], state[key]) for key in state)


def test_untrained_source_has_no_moments_to_grow(sized: Sized) -> None:
    grown = dict(grow_optimizer_state(plan_growth(sized(6), sized(10)), {}))
    assert {key.partition(".")[0] for key in grown} == {ROW_AGE, COLUMN_AGE}
    assert grown[f"{ROW_AGE}.blocks.0.ffn.key_param_tokens"].tolist() == [1] * 12 + [0] * 8


def test_fresh_optimizer_has_the_ages(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    plan = plan_growth(sized(6), sized(10), config=GrowthConfig(optimizer="fresh"))
    grown = dict(grow_optimizer_state(plan, collect_optimizer_state(*trained)))
    assert {key.partition(".")[0] for key in grown} == {ROW_AGE, COLUMN_AGE}
    assert (
        grown[f"{ROW_AGE}.blocks.1.attention.key.value_param_tokens"].tolist() == [5] * 6 + [0] * 4
    )


QUERY_KEY, QUERY_VALUE = (
    f"blocks.0.attention.query.{part}_param_tokens" for part in ("key", "value")
)


@pytest.mark.parametrize(
    ("changes", "name", "rows", "columns"),
    [
        ({"width": 18}, QUERY_KEY, [5] * 6, [5] * 16 + [0] * 2),
        ({"width": 18}, "embedding.weight", [5] * 40, [5] * 16 + [0] * 2),
        ({"width": 18}, "final_norm.bias", [5] * 16 + [0] * 2, None),
        ({"heads": 3}, QUERY_VALUE, [5] * 6, [5] * 16 + [0] * 8),
        # head h, channel j of the two old heads of 8 is at (h, j) of the new layout
        ({"head_dim": 9}, QUERY_VALUE, [5] * 6, [*[5] * 8, 0, *[5] * 8, 0]),
        ({"layers": 3}, QUERY_KEY.replace("0", "1"), [0] * 6, [0] * 16),
        ({"layers": 3}, QUERY_KEY.replace("0", "2"), [5] * 6, [5] * 16),
    ],
    ids=lambda value: value.rpartition(".")[0] or "norm" if isinstance(value, str) else None,
)
def test_row_and_column_ages_after_each_axis(
    trained: tuple[TokenFormer, torch.optim.Optimizer],
    sized: Sized,
    changes: dict[str, int],
    name: str,
    rows: list[int],
    columns: list[int] | None,
) -> None:
    plan = plan_growth(sized(6), sized(6, **{"head_dim": 8, **changes}))
    grown = dict(grow_optimizer_state(plan, collect_optimizer_state(*trained)))
    assert grown[f"{ROW_AGE}.{name}"].tolist() == rows
    if columns is not None:
        assert grown[f"{COLUMN_AGE}.{name}"].tolist() == columns


def test_ages_after_two_growths(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    model, optimizer = resumed(grown_from(*trained, sized(10)))
    for _ in range(3):
        update(model, optimizer)
    plan = plan_growth(sized(10), sized(11, width=17, head_dim=8))
    grown = dict(grow_optimizer_state(plan, collect_optimizer_state(model, optimizer)))
    assert grown[f"{ROW_AGE}.{QUERY_KEY}"].tolist() == [8] * 6 + [3] * 4 + [0]
    assert grown[f"{COLUMN_AGE}.{QUERY_KEY}"].tolist() == [8] * 16 + [0]
    assert grown[f"step.{QUERY_KEY}"].item() == 8


def test_first_update_of_a_new_entry_has_the_full_rate(
    trained: tuple[TokenFormer, torch.optim.Optimizer], sized: Sized
) -> None:
    # lr, as in the first update of any entry, not 0.45 lr as with the step count 5 of the tensor.
    model, optimizer = resumed(grown_from(*trained, sized(10)))
    optimizer.begin_stage(GrowthConfig(new_warmup_steps=0), updates_done=0)
    moved = update(model, optimizer)["blocks.0.attention.query.key_param_tokens"][6:]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, OPTIM.lr), rtol=1e-3, atol=0)
