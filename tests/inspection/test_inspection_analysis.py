"""Analysis of parameter tokens: activity, generations, and parameters by role."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.inspection.analysis import (
    ActivitySummary,
    Inspection,
    LayerSummary,
    inspect_checkpoint,
    role_parameters,
    summarise_activity,
)
from tokengrow.model.activity import Activity
from tokengrow.model.config import ROLES, ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.trainer import fit


def summary_of(contribution: list[float], counts: list[int]) -> ActivitySummary:
    """Summarise tokens with these contributions, a quarter of them as shares, and squares 8."""
    column = torch.tensor(contribution, dtype=torch.float64)
    return summarise_activity(Activity(column, column / 4, column * 0 + 8.0), counts)


def test_one_old_and_one_new_token_by_hand() -> None:
    summary = summary_of([3.0, 1.0], [1, 1])
    assert summary.contribution == [3.0, 1.0]
    assert summary.share == [0.75, 0.25]
    assert summary.effective == pytest.approx(4**2 / (9 + 1))
    assert summary.score_norm == 4.0, "the root of 8 + 8"
    assert summary.dead == [0, 0]


def test_effective_number_counts_equal_contributions() -> None:
    assert summary_of([2.0] * 5, [5]).effective == pytest.approx(5)
    assert summary_of([0.0, 7.0, 0.0], [3]).effective == pytest.approx(1)


def test_token_is_dead_up_to_a_thousandth_of_even_share() -> None:
    # Σ c² / Σ c = (16 + 0.0036² + 0.0044²) / 4.008 = 3.99203: tokens below 0.003992 are dead.
    assert summary_of([4.0, 0.0036, 0.0044], [1, 2]).dead == [0, 1]


def test_inactive_new_tokens_do_not_change_old_ones() -> None:
    before = summary_of([4.0, 1.0, 0.0048, 0.002], [4])
    after = summary_of([4.0, 1.0, 0.0048, 0.002] + [0.0] * 12, [4, 12])
    assert after.effective == pytest.approx(before.effective, rel=1e-12)
    assert (before.dead, after.dead) == ([1], [1, 12])


def test_all_tokens_are_dead_without_contributions() -> None:
    summary = summary_of([0.0, 0.0], [1, 1])
    assert (summary.effective, summary.dead) == (0.0, [1, 1])


def test_squares_of_tiny_contributions_do_not_underflow() -> None:
    assert summary_of([1e-200, 1e-200], [2]).effective == pytest.approx(2)


@pytest.fixture(scope="module")
def small(tiny_model: Callable[..., ModelConfig]) -> Checkpoint:
    """Two layers of random weights, with eight tokens per role and sixteen in the FFN."""
    config = tiny_model(8, init="published")
    model = TokenFormer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return Checkpoint.of(model)


def grow(source: Checkpoint, growth: GrowthConfig, **changes: Any) -> Checkpoint:
    plan = plan_growth(source.config, replace(source.config, **changes), config=growth)
    return grow_checkpoint(source, plan)


def tokens(n: int, ffn: int) -> ParameterTokens:
    return ParameterTokens(query=n, key=n, value=n, output=n, ffn=ffn)


def contribution(layer: LayerSummary) -> list[float]:
    assert layer.activity is not None
    return layer.activity.contribution


@pytest.mark.parametrize(
    "growth", [GrowthConfig(), GrowthConfig(init="gram", tau="recompute")], ids=lambda g: g.init
)
def test_tokens_of_exact_growth_contribute_exactly_nothing(
    small: Checkpoint, growth: GrowthConfig, text: torch.Tensor
) -> None:
    inspection = inspect_checkpoint(grow(small, growth, tokens=tokens(16, 32)), text)
    for layer in inspection.layers:
        old, new = contribution(layer)
        assert old > 0 and new == 0.0
    assert set(map(tuple, inspection.shares().values())) == {(1.0, 0.0)}
    assert inspection.dead_tokens()[1] == 2 * (4 * 8 + 16)


def test_tokens_of_published_growth_contribute_at_once(
    small: Checkpoint, text: torch.Tensor
) -> None:
    loose = GrowthConfig(init="published", tau="recompute", tolerance=float("inf"))
    inspection = inspect_checkpoint(grow(small, loose, tokens=tokens(16, 32)), text)
    assert all(contribution(layer)[1] > 0 for layer in inspection.layers)


def test_new_layer_adds_nothing_to_residual_stream(small: Checkpoint, text: torch.Tensor) -> None:
    inspection = inspect_checkpoint(grow(small, GrowthConfig(), layers=3), text)
    new = {layer.role: contribution(layer) for layer in inspection.layers if layer.layer == 1}
    assert all(new[role][0] == 0.0 for role in ROLES), "all its tokens are new"
    assert new["output"][1] == new["ffn"][1] == 0.0
    assert min(new[role][1] for role in ("query", "key", "value")) > 0


def test_norms_without_text_show_zero_keys_of_growth(small: Checkpoint) -> None:
    plan = plan_growth(small.config, replace(small.config, tokens=tokens(8, 20)))
    inspection = inspect_checkpoint(grow_checkpoint(small, plan))
    assert inspection.text_tokens == 0
    for layer in inspection.layers:
        assert layer.activity is None
        assert layer.key_norm[0] > 0 and layer.key_norm[1] == 0.0
        assert (layer.value_norm[1] > 0) == (layer.role == "ffn")


def test_norm_is_root_mean_square_of_lengths(small: Checkpoint) -> None:
    layer = next(layer for layer in inspect_checkpoint(small).layers if layer.role == "ffn")
    key = small.weights["blocks.0.ffn.key_param_tokens"].double()
    assert layer.key_norm == [pytest.approx(key.norm(dim=1).square().mean().sqrt().item())]


@pytest.fixture(scope="module")
def trained(
    tiny_run: Callable[..., Any],
    store: TokenStore,
    text: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Inspection:
    """Inspection of a run that grew 8 -> 12 -> 16 tokens, with six updates in each stage."""
    run = fit(tiny_run(tmp_path_factory.mktemp("trained") / "run"), store)
    assert run.checkpoint.folder is not None
    return inspect_checkpoint(load_checkpoint(run.checkpoint.folder, streamed=True), text)


def test_ladder_of_three_rungs_has_three_generations(trained: Inspection) -> None:
    assert [generation.axes for generation in trained.generations] == [[], ["tokens"], ["tokens"]]
    assert [generation.updates for generation in trained.generations] == [18, 12, 6]
    # Two layers, each with four roles of n tokens and one of 2 n.
    expected = [2 * 6 * 8, 2 * 6 * 4, 2 * 6 * 4]
    assert [generation.tokens for generation in trained.generations] == expected


def test_tokens_trained_longer_contribute_more(trained: Inspection) -> None:
    for share in trained.shares().values():
        assert share[0] > share[1] > share[2] > 0
        assert sum(share) == pytest.approx(1)


def test_summary_and_dict_are_json(trained: Inspection) -> None:
    figures = json.loads(json.dumps(trained.to_dict(), allow_nan=False))
    assert figures["shares"] == trained.shares()
    assert figures["layers"][0]["tokens"] == [8, 4, 4]
    assert len(figures["lineage"]) == 2
    assert json.loads(json.dumps(trained.summary()))["step"] == 18


def test_roles_cover_each_parameter_once(trained: Inspection) -> None:
    roles = trained.role_parameters
    assert [each.role for each in roles] == ["embedding", *ROLES, "final_norm"]
    config = trained.checkpoint.config
    assert sum(each.parameters for each in roles) == config.num_parameters()
    for each in roles[1:6]:
        assert (each.tokens, each.d_in, each.d_out) == config.role_shape(each.role)


def test_roles_of_model_with_linear_layers() -> None:
    block = {"attention.query.weight": [6, 4], "attention.query.bias": [6], "norm.weight": [4]}
    shapes = {f"blocks.{n}.{name}": shape for n in range(2) for name, shape in block.items()}
    roles = {each.role: each for each in role_parameters({**shapes, "embedding.weight": [9, 4]})}
    query, norm, embedding = roles["attention.query"], roles["norm"], roles["embedding"]
    assert (query.tokens, query.d_in, query.d_out, query.parameters) == (None, 4, 6, 2 * 30)
    assert (embedding.d_in, embedding.d_out) == (9, 4)
    assert (norm.d_in, norm.d_out, norm.parameters) == (None, 4, 8)


def test_half_precision_weights_are_reported(small: Checkpoint) -> None:
    half = {name: weight.bfloat16() for name, weight in small.weights.items()}
    assert inspect_checkpoint(replace(small, weights=half)).dtypes == ["bfloat16"]
