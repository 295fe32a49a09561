"""Growth plans: steps, inherited fields, and refused targets."""

from collections.abc import Callable
from typing import Any

import pytest

from tokengrow.errors import UserError
from tokengrow.growth.plan import INHERITED_FIELDS, plan_growth
from tokengrow.model.config import ModelConfig, ParameterTokens, Taus

Sized = Callable[..., ModelConfig]


def test_growth_of_tokens_is_one_step(sized: Sized) -> None:
    plan = plan_growth(sized(6), sized(9))
    assert plan.source == sized(6)
    (step,) = plan.steps
    assert step.axis == "tokens"
    assert (step.source, step.target) == (plan.source, plan.target)
    assert step.changes == {
        "tokens.query": (6, 9),
        "tokens.key": (6, 9),
        "tokens.value": (6, 9),
        "tokens.output": (6, 9),
        "tokens.ffn": (12, 18),
    }


def test_single_role_can_grow(sized: Sized) -> None:
    tokens = ParameterTokens(query=6, key=6, value=6, output=6, ffn=13)
    (step,) = plan_growth(sized(6), sized(6, tokens=tokens)).steps
    assert step.changes == {"tokens.ffn": (12, 13)}


def test_equal_sizes_need_no_step(sized: Sized) -> None:
    plan = plan_growth(sized(6), sized(6))
    assert plan.steps == ()
    assert plan.target == plan.source


@pytest.mark.parametrize(
    ("key", "inherited", "requested"),
    [
        ("tau", Taus(query=2.0, key=2.1, value=2.2, output=2.3, ffn=2.4), Taus(query=9.0)),
        ("rotary_channels", 4, 8),
        ("rotary_base", 500.0, 10000.0),
        ("norm_eps", 1e-6, 1e-5),
        ("final_norm_eps", 1e-6, 1e-5),
        ("init", "published", "balanced"),
    ],
)
def test_inherited_fields_are_those_of_the_source(
    sized: Sized, key: str, inherited: Any, requested: Any
) -> None:
    plan = plan_growth(sized(6, **{key: inherited}), sized(9, **{key: requested}))
    assert getattr(plan.target, key) == inherited
    assert plan.target.tokens == sized(9).tokens


def test_every_inherited_field_is_tested() -> None:
    tested = {"tau", "rotary_channels", "rotary_base", "norm_eps", "final_norm_eps", "init"}
    assert set(INHERITED_FIELDS) == tested


def test_tau_stays_that_of_the_first_model(sized: Sized) -> None:
    second = plan_growth(sized(6), sized(9)).target
    third = plan_growth(second, sized(20)).target
    assert third.tau == Taus.default(sized(6).tokens)


@pytest.mark.parametrize("role", ["query", "key", "value", "output", "ffn"])
def test_smaller_role_is_refused_by_name(sized: Sized, role: str) -> None:
    sizes = {"query": 9, "key": 9, "value": 9, "output": 9, "ffn": 18}
    target = sized(9, tokens=ParameterTokens(**{**sizes, role: 5}))
    before = 12 if role == "ffn" else 6
    message = rf"model\.tokens\.{role} must be at least {before}, got 5\..*{role}={before} or more"
    with pytest.raises(UserError, match=message):
        plan_growth(sized(6), target)


def test_every_axis_is_one_step_in_fixed_order(sized: Sized) -> None:
    target = sized(9, width=24, heads=3, head_dim=10, layers=5)
    plan = plan_growth(sized(6), target)
    assert [step.axis for step in plan.steps] == ["width", "heads", "tokens", "depth"]
    changes = {key: value for step in plan.steps for key, value in step.changes.items()}
    assert changes["width"] == (16, 24)
    assert (changes["heads"], changes["head_dim"]) == ((2, 3), (8, 10))
    assert changes["layers"] == (2, 5)
    assert plan.target.rotary_channels == plan.source.rotary_channels == 2
    assert plan.steps[-1].target == plan.target


@pytest.mark.parametrize(
    ("activation", "block_share"), [("l2_norm_gelu", 1.0), ("gelu_l2_norm", 0.5)]
)
def test_wider_model_has_smaller_epsilons(
    sized: Sized, activation: str, block_share: float
) -> None:
    source = sized(6, activation=activation, norm_eps=2e-5, final_norm_eps=4e-5)
    target = plan_growth(source, sized(6, width=32, head_dim=8, activation=activation)).target
    assert target.final_norm_eps == pytest.approx(2e-5)  # half the variance, half the epsilon
    assert target.norm_eps == pytest.approx(2e-5 * block_share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"width": 12, "head_dim": 8},
            r"model\.width must be at least 16, got 12\. Growth never",
        ),
        ({"heads": 1, "head_dim": 8}, r"model\.heads must be at least 2, got 1\."),
        ({"heads": 4}, r"model\.head_dim must be at least 8, got 4\."),
        ({"layers": 1}, r"model\.layers must be at least 2, got 1\."),
    ],
)
def test_smaller_axis_is_refused(sized: Sized, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_growth(sized(6), sized(9, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 41},
            r"model\.vocab_size must stay 40, got 41\..*Set model\.vocab_size=40\.",
        ),
        (
            {"context_length": 24},
            r"context_length must stay 12, got 24\. Growth changes only width",
        ),
        ({"activation": "softmax"}, r"model\.activation must stay l2_norm_gelu, got softmax\."),
    ],
)
def test_key_that_growth_cannot_change_is_refused(
    sized: Sized, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_growth(sized(6), sized(9, **changes))
