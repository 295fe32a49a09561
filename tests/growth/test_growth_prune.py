"""Pruning removes the tokens that contribute least, and undoes a growth by zero keys."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengrow.errors import UserError
from tokengrow.growth.engine import apply_growth
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.prune import (
    AppliedPruning,
    apply_pruning,
    plan_pruning,
    rescaled_tau,
    rows_by_name,
    select_optimizer_rows,
    select_tokens,
)
from tokengrow.growth.tokens import token_tensors
from tokengrow.model.activity import Activity, measure_activity
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens, Taus
from tokengrow.model.tokenformer import TokenFormer

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]
TEXT, PROBE = torch.randint(40, (2, 4, 13), generator=torch.Generator().manual_seed(5))
FFN = "blocks.0.ffn.{}_param_tokens"


def pruned(model: TokenFormer, target: ModelConfig, optimizer: Any = None) -> AppliedPruning:
    """Prune a model to the sizes of `target`."""
    plan = plan_pruning(model.config, target)
    return apply_pruning(model.config, plan, model.to_weights(), optimizer or {}, TEXT, PROBE)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[ParameterTokens, ParameterTokens]:
    """Draw the tokens of each role before and after a growth of some or all roles."""
    before = {role: draw(st.integers(2, 9)) for role in ROLES}
    grown = {role: n + draw(st.integers(0, 7)) for role, n in before.items()}
    grown["ffn"] += before == grown
    return ParameterTokens(**before), ParameterTokens(**grown)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=sizes(),
    activation=st.sampled_from(["l2_norm_gelu", "gelu_l2_norm"]),
    heads=st.integers(1, 3),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_pruning_undoes_a_zero_key_growth_bitwise(
    random_model: RandomModel,
    sized: Sized,
    dtype: torch.dtype,
    tokens: tuple[ParameterTokens, ParameterTokens],
    activation: str,
    heads: int,
    layers: int,
    seed: int,
) -> None:
    shape = {"activation": activation, "heads": heads, "head_dim": 6, "layers": layers}
    source = random_model(sized(2, tokens=tokens[0], **shape), seed, dtype)
    moments = {
        f"{slot}.{name}": torch.rand_like(tensor)
        for slot in ("exp_avg", "exp_avg_sq")
        for name, tensor in source.to_weights().items()
    }
    plan = plan_growth(source.config, replace(source.config, tokens=tokens[1]))
    grown = apply_growth(plan, source.to_weights(), moments)
    target = plan_pruning(grown.config, source.config)
    back = apply_pruning(grown.config, target, grown.weights, grown.optimizer, TEXT, PROBE)
    assert back.config == source.config, "including tau"
    ages = {key for key in back.optimizer if key not in moments}  # only old tokens are left
    assert all((back.optimizer[key] == 1).all() for key in ages)
    carried = {key: tensor for key, tensor in back.optimizer.items() if key not in ages}
    for found, expected in ((back.weights, source.to_weights()), (carried, moments)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert set(back.report["kept_contribution"].values()) <= {1.0}


def activity(contribution: list[float], share: list[float]) -> Activity:
    """Return the activity of one layer; pruning does not use the squared scores."""
    columns = (contribution, share, share)
    return Activity(*(torch.tensor(each, dtype=torch.float64) for each in columns))


def test_largest_contributions_are_kept_in_order(sized: Sized) -> None:
    found = {
        (0, "ffn"): activity([1.0, 4.0, 2.0, 3.0], [0.25] * 4),
        (1, "ffn"): activity([7.0, 7.0, 7.0, 7.0], [0.25] * 4),
    }
    kept = select_tokens(found, sized(1))  # two tokens in the FFN
    assert kept[0, "ffn"].tolist() == [1, 3]
    assert kept[1, "ffn"].tolist() == [0, 1], "of equal ones, the earlier"


def test_tau_squared_shrinks_by_mean_removed_share(sized: Sized) -> None:
    single = activity([1.0], [1.0])
    found = {(0, role): single for role in ROLES[:4]} | {
        (0, "ffn"): activity([1.0, 4.0, 2.0, 3.0], [0.1, 0.4, 0.2, 0.3]),
        (1, "ffn"): activity([4.0, 1.0, 3.0, 2.0], [0.3, 0.4, 0.2, 0.1]),
    }
    config = sized(1, tau=Taus(query=1.5, ffn=3.0))
    tau = rescaled_tau(found, select_tokens(found, config), config)
    # removed: 0.1 + 0.2 in one layer, 0.4 + 0.1 in the other, 0.4 on average
    assert tau.ffn == pytest.approx(3.0 * 0.6**0.5, rel=1e-12)
    assert asdict(tau) | {"ffn": 0} == asdict(config.tau) | {"ffn": 0}


def test_tau_stays_if_kept_tokens_score_zero(sized: Sized) -> None:
    found = {(0, role): activity([0.0, 0.0, 0.0], [0.0, 0.0, 1.0]) for role in ROLES}
    config = sized(1, tokens=ParameterTokens(query=2, key=2, value=2, output=2, ffn=2))
    tau = rescaled_tau(found, select_tokens(found, config), config)
    assert tau == config.tau, "0 would request sqrt(N)"


def test_softmax_over_fewer_tokens_keeps_weights(random_model: RandomModel, sized: Sized) -> None:
    # Each of 6 zero keys has weight 1/6, times tau² = 6; each of 4 has 1/4, times tau² = 4.
    model = random_model(sized(6, activation="softmax"))
    for name, parameter in model.named_parameters():
        if name.endswith("key_param_tokens"):
            parameter.data.zero_()
    found = pruned(model, sized(4, activation="softmax"))
    assert found.config.tau.query == pytest.approx(2.0, rel=1e-6)
    assert found.weights["blocks.0.attention.query.key_param_tokens"].shape[0] == 4


def test_kept_rows_are_those_of_the_source(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    before, found = model.to_weights(), pruned(model, sized(4))
    kept = rows_by_name(
        select_tokens(measure_activity(model.config, before, TEXT[:, :-1]), sized(4))
    )
    assert found.config.tokens == sized(4).tokens
    for name, tensor in before.items():
        if name in token_tensors(model.config):
            assert torch.equal(found.weights[name].float(), tensor.float()[kept[name]])
        else:
            assert torch.equal(found.weights[name].float(), tensor.float())
    assert torch.equal(kept[FFN.format("key")], kept[FFN.format("value")])


def test_removing_largest_contributions_drifts_more(
    random_model: RandomModel, sized: Sized
) -> None:
    model = random_model(sized(20), dtype=torch.float32)
    found = pruned(model, sized(15))
    weights = model.to_weights()
    low = {
        layer: replace(each, contribution=-each.contribution)
        for layer, each in measure_activity(model.config, weights, TEXT[:, :-1]).items()
    }
    worst = select_tokens(low, sized(15))
    for name, rows in rows_by_name(worst).items():
        weights[name] = weights[name][rows]
    config = replace(sized(15), tau=rescaled_tau(low, worst, model.config))
    other = TokenFormer.from_weights(config, weights)
    with torch.no_grad():
        moved = (other(PROBE[:, :-1]) - model(PROBE[:, :-1])).abs().mean().item()
    assert found.report["drift"]["mean_logit"] < 0.5 * moved


def test_optimizer_rows_are_removed_with_their_tokens(
    random_model: RandomModel, sized: Sized
) -> None:
    model = random_model(sized(8))  # 16 channels, and 16 tokens in the FFN
    weights, name = model.to_weights(), FFN.format("key")
    state = {
        f"step.{name}": torch.tensor(7.0),
        f"exp_avg.{name}": torch.arange(256.0).view(16, 16),
        f"row_age.{name}": torch.arange(16),
        f"column_age.{name}": torch.arange(100, 116),
        "exp_avg.embedding.weight": torch.rand(40, 16),
    }
    smaller = select_optimizer_rows(state, {name: torch.tensor([2, 5])}, weights)
    assert smaller[f"exp_avg.{name}"][:, 0].tolist() == [32.0, 80.0]
    assert smaller[f"row_age.{name}"].tolist() == [2, 5]
    for unchanged in (f"step.{name}", f"column_age.{name}", "exp_avg.embedding.weight"):
        assert torch.equal(smaller[unchanged], state[unchanged])


def test_report_has_steps_and_drift_on_the_probe(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6), dtype=torch.float32)
    report = pruned(model, sized(6, tokens=replace(sized(6).tokens, ffn=7))).report
    assert report["operation"] == "prune"
    (step,) = report["steps"]
    assert step["axis"] == "tokens"
    assert step["changes"].keys() == {"tokens.ffn", "tau.ffn"}
    assert report["kept_contribution"].keys() == {"ffn"}
    assert 0.5 < report["kept_contribution"]["ffn"] < 1
    with torch.no_grad():
        logits = model(PROBE[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, PROBE[:, 1:].flatten()).item()
    assert report["drift"]["loss_source"] == pytest.approx(loss, rel=1e-5)
    assert report["drift"]["probe_tokens"] == 4 * 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": ParameterTokens(query=7, key=6, value=6, output=6, ffn=12)},
            r"query must be at most 6, got 7\. Pru",
        ),
        ({"layers": 1}, r"model\.layers must stay 2, got 1\. Pruning removes only parameter"),
        ({"width": 20}, r"model\.width must stay 16, got 20\. Pruning removes only parameter"),
        ({}, r"model must be smaller than source.*model\.tokens\.ffn=6\."),
    ],
    ids=str,
)
def test_invalid_target_is_refused(sized: Sized, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_pruning(sized(6), sized(6, **changes))


def test_inherited_fields_are_those_of_the_source(sized: Sized) -> None:
    source = sized(6, tau=Taus(ffn=9.0), rotary_base=500.0)
    assert plan_pruning(source, sized(4)) == replace(source, tokens=sized(4).tokens)
