"""What parameter tokens do, by the growth that they came with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from tokengrow.model.config import ROLES, ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.trainer import fit

TEXT = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(3))


def doing(contribution: list[float], counts: list[int]) -> ActivitySummary:
    column = torch.tensor(contribution, dtype=torch.float64)
    return summarise_activity(Activity(column, column / 4, column * 0 + 8.0), counts)


def test_two_tokens_one_old_and_one_new_worked_by_hand() -> None:
    found = doing([3.0, 1.0], [1, 1])
    assert found.contribution == [3.0, 1.0]
    assert found.share == [0.75, 0.25]
    assert found.effective == pytest.approx(4**2 / (9 + 1))
    assert found.score_norm == 4.0, "the root of 8 + 8"
    assert found.dead == [0, 0]


def test_as_many_tokens_are_effective_as_contribute_alike() -> None:
    assert doing([2.0] * 5, [5]).effective == pytest.approx(5)
    assert doing([0.0, 7.0, 0.0], [3]).effective == pytest.approx(1)


def test_a_token_is_dead_up_to_a_thousandth_of_the_even_share() -> None:
    # Σ c² / Σ c = (16 + 0.0036² + 0.0044²) / 4.008 = 3.99203: dead is what is below 0.003992.
    assert doing([4.0, 0.0036, 0.0044], [1, 2]).dead == [0, 1]


def test_tokens_that_do_nothing_yet_change_nothing_for_the_others() -> None:
    before = doing([4.0, 1.0, 0.0048, 0.002], [4])
    after = doing([4.0, 1.0, 0.0048, 0.002] + [0.0] * 12, [4, 12])
    assert after.effective == pytest.approx(before.effective, rel=1e-12)
    assert (before.dead, after.dead) == ([1], [1, 12])


def test_where_nothing_contributes_all_are_dead() -> None:
    found = doing([0.0, 0.0], [1, 1])
    assert (found.effective, found.dead) == (0.0, [1, 1])


def test_contributions_too_small_to_be_squared_still_count() -> None:
    assert doing([1e-200, 1e-200], [2]).effective == pytest.approx(2)


@pytest.fixture(scope="module")
def small(tiny_model: Callable[..., ModelConfig]) -> Checkpoint:
    """Two layers of random weights, eight tokens per role and sixteen in the FFN."""
    config = tiny_model(8, init="published")
    model = TokenFormer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return Checkpoint.of(model)


def grown(source: Checkpoint, growth: GrowthConfig, **changes: Any) -> Inspection:
    plan = plan_growth(source.config, replace(source.config, **changes), config=growth)
    return inspect_checkpoint(grow_checkpoint(source, plan), TEXT)


def tokens(n: int, ffn: int) -> Tokens:
    return Tokens(query=n, key=n, value=n, output=n, ffn=ffn)


def contribution(found: LayerSummary) -> list[float]:
    assert found.activity is not None
    return found.activity.contribution


@pytest.mark.parametrize(
    "growth", [GrowthConfig(), GrowthConfig(init="gram", tau="recompute")], ids=lambda g: g.init
)
def test_right_after_an_exact_growth_its_tokens_contribute_exactly_nothing(
    small: Checkpoint, growth: GrowthConfig
) -> None:
    found = grown(small, growth, tokens=tokens(16, 32))
    for layer in found.layers:
        old, new = contribution(layer)
        assert old > 0 and new == 0.0
    assert set(map(tuple, found.shares().values())) == {(1.0, 0.0)}
    assert found.dead_tokens()[1] == 2 * (4 * 8 + 16)


def test_tokens_of_the_published_growth_contribute_at_once(small: Checkpoint) -> None:
    loose = GrowthConfig(init="published", tau="recompute", tolerance=float("inf"))
    found = grown(small, loose, tokens=tokens(16, 32))
    assert all(contribution(layer)[1] > 0 for layer in found.layers)


def test_of_a_new_layer_only_what_adds_to_the_stream_is_silent(small: Checkpoint) -> None:
    found = grown(small, GrowthConfig(), layers=3)
    new = {layer.role: contribution(layer) for layer in found.layers if layer.layer == 1}
    assert all(new[role][0] == 0.0 for role in ROLES), "none of it is old"
    assert new["output"][1] == new["ffn"][1] == 0.0
    assert min(new[role][1] for role in ("query", "key", "value")) > 0


def test_without_text_the_zero_keys_of_a_growth_still_show(small: Checkpoint) -> None:
    plan = plan_growth(small.config, replace(small.config, tokens=tokens(8, 20)))
    found = inspect_checkpoint(grow_checkpoint(small, plan))
    assert found.text_tokens == 0
    for layer in found.layers:
        assert layer.activity is None
        assert layer.key_norm[0] > 0 and layer.key_norm[1] == 0.0
        assert (layer.value_norm[1] > 0) == (layer.role == "ffn")


def test_a_norm_is_the_root_mean_square_of_the_lengths(small: Checkpoint) -> None:
    layer = next(each for each in inspect_checkpoint(small).layers if each.role == "ffn")
    key = small.weights["blocks.0.ffn.key_param_tokens"].double()
    assert layer.key_norm == [pytest.approx(key.norm(dim=1).square().mean().sqrt().item())]


@pytest.fixture(scope="module")
def climbed(
    tiny_run: Callable[..., Any], store: TokenStore, tmp_path_factory: pytest.TempPathFactory
) -> Inspection:
    """A run that grew 8 -> 12 -> 16 tokens, six updates in each stage."""
    run = fit(tiny_run(tmp_path_factory.mktemp("climbed") / "run"), store)
    assert run.checkpoint.folder is not None
    return inspect_checkpoint(load_checkpoint(run.checkpoint.folder, streamed=True), TEXT)


def test_a_ladder_of_three_rungs_has_three_generations(climbed: Inspection) -> None:
    assert [each.axes for each in climbed.generations] == [[], ["tokens"], ["tokens"]]
    assert [each.updates for each in climbed.generations] == [18, 12, 6]
    # two layers, four roles of n and one of 2 n
    assert [each.tokens for each in climbed.generations] == [2 * 6 * 8, 2 * 6 * 4, 2 * 6 * 4]


def test_the_longer_tokens_are_trained_the_more_they_contribute(climbed: Inspection) -> None:
    for share in climbed.shares().values():
        assert share[0] > share[1] > share[2] > 0
        assert sum(share) == pytest.approx(1)


def test_a_summary_and_all_figures_are_plain_json(climbed: Inspection) -> None:
    figures = json.loads(json.dumps(climbed.to_dict(), allow_nan=False))
    assert figures["shares"] == climbed.shares()
    assert figures["layers"][0]["tokens"] == [8, 4, 4]
    assert len(figures["lineage"]) == 2
    assert json.loads(json.dumps(climbed.summary()))["step"] == 18


def test_parts_are_all_parameters_and_nothing_twice(climbed: Inspection) -> None:
    assert [part.role for part in climbed.parts] == ["embedding", *ROLES, "final_norm"]
    config = climbed.checkpoint.config
    assert sum(part.parameters for part in climbed.parts) == config.num_parameters()
    for part in climbed.parts[1:6]:
        assert (part.tokens, part.d_in, part.d_out) == config.role_shape(part.role)


def test_parts_of_a_model_of_linear_layers() -> None:
    block = {"attention.query.weight": [6, 4], "attention.query.bias": [6], "norm.weight": [4]}
    shapes = {f"blocks.{n}.{name}": shape for n in range(2) for name, shape in block.items()}
    found = {part.role: part for part in role_parameters({**shapes, "embedding.weight": [9, 4]})}
    query = found["attention.query"]
    assert (query.tokens, query.d_in, query.d_out, query.parameters) == (None, 4, 6, 2 * 30)
    assert (found["embedding"].d_in, found["embedding"].d_out) == (9, 4)
    assert (found["norm"].d_in, found["norm"].d_out, found["norm"].parameters) == (None, 4, 8)


def test_half_precision_is_told(small: Checkpoint, tmp_path: Path) -> None:
    half = {name: each.bfloat16() for name, each in small.weights.items()}
    assert inspect_checkpoint(replace(small, weights=half)).dtypes == ["bfloat16"]
