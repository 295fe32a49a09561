"""Growth of a checkpoint from disk to disk: same result as in memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokengrow.checkpoint.layout import LINEAGE
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.growth.checkpoint import grow_checkpoint, grow_checkpoint_on_disk
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.plan import GrowthPlan, plan_growth
from tokengrow.growth.verify import DriftError
from tokengrow.model.config import ParameterTokens

LARGER = {"layers": 3, "width": 40, "heads": 3, "head_dim": 20}
"""Sizes above those of the source: two layers, width 32, two heads of 16."""


def plan_from(source: Checkpoint, config: GrowthConfig | None = None) -> GrowthPlan:
    """Plan a growth along all axes."""
    tokens = ParameterTokens(query=50, key=50, value=50, output=50, ffn=80)
    target = replace(source.config, **LARGER, tokens=tokens)
    return plan_growth(source.config, target, config=config or GrowthConfig())


@pytest.mark.parametrize("growth", [GrowthConfig(), GrowthConfig(init="gram", tau="recompute")])
def test_growth_on_disk_equals_growth_in_memory(
    source: Path, tmp_path: Path, growth: GrowthConfig
) -> None:
    plan = plan_from(load_checkpoint(source), growth)
    in_memory = save_checkpoint(tmp_path / "memory", grow_checkpoint(load_checkpoint(source), plan))
    on_disk = grow_checkpoint_on_disk(
        load_checkpoint(source, streamed=True), plan, tmp_path / "disk"
    )
    assert on_disk.folder == tmp_path / "disk"
    one, other = load_checkpoint(in_memory), load_checkpoint(tmp_path / "disk")
    for mine, theirs in ((one.weights, other.weights), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (in_memory / LINEAGE).read_text() == (tmp_path / "disk" / LINEAGE).read_text()
    assert (one.config, one.train_state, one.run) == (other.config, other.train_state, other.run)


def test_refused_growth_leaves_no_files(source: Path, tmp_path: Path) -> None:
    streamed = load_checkpoint(source, streamed=True)
    plan = plan_from(streamed, GrowthConfig(tau="recompute"))
    with pytest.raises(DriftError):
        grow_checkpoint_on_disk(streamed, plan, tmp_path / "new" / "grown")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_tracked(source: Path, tmp_path: Path) -> None:
    streamed = load_checkpoint(source, streamed=True)
    seen: dict[str, tuple[int, int]] = {}

    def track(tensors, description, total):  # type: ignore[no-untyped-def]
        tensors = list(tensors)
        seen[description] = len(tensors), total
        return tensors

    grow_checkpoint_on_disk(streamed, plan_from(streamed), tmp_path / "grown", track=track)
    assert seen.keys() == {"weights", "optimizer state"}
    assert seen["weights"] == (33, 33)  # 3 blocks of 10, embedding, norm
    done, total = seen["optimizer state"]
    assert done == 33 * 5 - 2 <= total  # the two vectors of the norm have no columns
