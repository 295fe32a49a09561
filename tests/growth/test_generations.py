"""Generations of parameter tokens, derived from the lineage."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokengrow.checkpoint.schema import LineageEntry
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.errors import UserError
from tokengrow.growth.checkpoint import grow_checkpoint, prune_checkpoint
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.generations import (
    GENERATIONS_KEY,
    GenerationCounts,
    count_generations,
    count_kept,
)
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.prune import plan_pruning
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer

Sized = Callable[..., ModelConfig]
TEXT, PROBE = torch.randint(40, (2, 2, 13), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def initial(random_model: Callable[..., TokenFormer], sized: Sized) -> Checkpoint:
    """Checkpoint without growths: two layers, four tokens per role and eight in the FFN."""
    return Checkpoint.of(random_model(sized(4), dtype=torch.float32))


def grown(source: Checkpoint, growth: GrowthConfig | None = None, **changes: Any) -> Checkpoint:
    """Grow a checkpoint by changes of its config."""
    target = replace(source.config, **changes)
    return grow_checkpoint(source, plan_growth(source.config, target, config=growth or DEFAULT))


def pruned(source: Checkpoint, target: ModelConfig) -> Checkpoint:
    """Prune a checkpoint to the sizes of `target`."""
    return prune_checkpoint(source, plan_pruning(source.config, target), TEXT, PROBE)


DEFAULT = GrowthConfig()


def tokens(n: int, ffn: int) -> ParameterTokens:
    """Return the same number for all attention roles, and one for the FFN."""
    return ParameterTokens(query=n, key=n, value=n, output=n, ffn=ffn)


def found(checkpoint: Checkpoint) -> GenerationCounts:
    """Count the generations of a lineage that was written and read."""
    written = json.loads(json.dumps([entry.to_dict() for entry in checkpoint.lineage]))
    return count_generations(
        checkpoint.config, [LineageEntry.from_dict(entry) for entry in written]
    )


def test_model_without_growth_has_one_generation(initial: Checkpoint) -> None:
    counts = found(initial)
    assert counts[0, "query"] == [4] and counts[1, "ffn"] == [8]
    assert len(counts) == 2 * 5


def test_each_growth_appends_a_generation(initial: Checkpoint) -> None:
    twice = grown(grown(initial, tokens=tokens(6, 8)), tokens=tokens(7, 12))
    counts = found(twice)
    assert counts[0, "query"] == counts[1, "output"] == [4, 2, 1]
    assert counts[1, "ffn"] == [8, 0, 4], "the first growth did not change the FFN"


def test_new_layer_belongs_to_its_growth(initial: Checkpoint) -> None:
    counts = found(grown(initial, layers=3))
    assert [counts[layer, "ffn"] for layer in range(3)] == [[8, 0], [0, 8], [8, 0]]
    on_top = found(grown(initial, GrowthConfig(new_block_place="top"), layers=3))
    assert [on_top[layer, "key"] for layer in range(3)] == [[4, 0], [4, 0], [0, 4]]


def test_tokens_and_layers_of_one_growth_are_one_generation(initial: Checkpoint) -> None:
    counts = found(grown(grown(initial, tokens=tokens(5, 8)), tokens=tokens(7, 8), layers=3))
    assert [counts[layer, "query"] for layer in range(3)] == [[4, 1, 2], [0, 0, 7], [4, 1, 2]]


def test_width_and_heads_add_no_tokens(initial: Checkpoint) -> None:
    counts = found(grown(initial, width=20, heads=4, head_dim=10))
    assert set(map(tuple, counts.values())) == {(4, 0), (8, 0)}


def test_pruning_counts_kept_tokens_of_each_generation(initial: Checkpoint) -> None:
    counts = {(0, role): [3, 2] for role in ("query", "key", "value", "output", "ffn")}
    kept = dict.fromkeys(counts, torch.tensor([0, 2, 4]))
    assert count_kept(counts, kept)["ffn"] == [[2, 1]]


def test_growth_that_was_pruned_has_no_tokens(initial: Checkpoint) -> None:
    back = pruned(grown(initial, tokens=tokens(6, 9)), initial.config)
    assert found(back)[0, "query"] == [4, 0, 0]
    assert found(grown(back, tokens=tokens(4, 11)))[1, "ffn"] == [8, 0, 0, 3]


def test_counts_of_pruned_model_match_its_rows(initial: Checkpoint) -> None:
    both = grown(initial, tokens=tokens(4, 12))
    keys = both.weights["blocks.0.ffn.key_param_tokens"]
    keys[8:] = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))  # no longer zero
    left = pruned(both, replace(both.config, tokens=tokens(4, 6)))
    rows = left.weights["blocks.0.ffn.key_param_tokens"]
    old = int((rows[:, None] == keys[:8]).all(-1).any(1).sum())
    assert 0 < old < 6, "some of both"
    assert found(left)[0, "ffn"] == [old, 6 - old, 0]


def test_pruning_without_record_resets_generations(initial: Checkpoint) -> None:
    back = pruned(grown(initial, tokens=tokens(6, 8)), initial.config)
    *before, entry = back.lineage
    settings = {key: value for key, value in entry.settings.items() if key != GENERATIONS_KEY}
    lineage = [*before, replace(entry, settings=settings)]
    assert count_generations(back.config, lineage)[0, "query"] == [4, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": tokens(4, 8)}, "got 5 parameter tokens of role query in layer 0 instead of 4"),
        ({"tokens": tokens(5, 8), "layers": 1}, "got 2 layers instead of 1"),
    ],
    ids=str,
)
def test_lineage_of_another_model_is_refused(
    initial: Checkpoint, changes: dict[str, Any], message: str
) -> None:
    lineage = grown(initial, tokens=tokens(5, 8)).lineage
    with pytest.raises(UserError, match=message):
        count_generations(replace(initial.config, **changes), lineage)
