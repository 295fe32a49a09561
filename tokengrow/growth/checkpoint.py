"""What happens to a checkpoint between two stages, and in `tokengrow grow`: it is grown and
verified. In `tokengrow prune` it is made smaller, and measured."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tokengrow.checkpoint import layout
from tokengrow.checkpoint.schema import LineageEntry
from tokengrow.checkpoint.store import (
    Checkpoint,
    load_checkpoint,
    write_records,
)
from tokengrow.checkpoint.tensors import TensorFile, stream_tensors
from tokengrow.files import atomic_directory
from tokengrow.growth.engine import apply_growth, grown_weights, growth_report, verify_growth
from tokengrow.growth.generations import RECORD, generations, left_of
from tokengrow.growth.moments import ALL_SLOTS, grown_moments
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.prune import prune
from tokengrow.model.architectures import as_tokenformer
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import weight_shapes

NOTHING: Mapping[str, Tensor] = {}
"""The tensors of a checkpoint that is described alone."""

Stream = Iterable[tuple[str, Tensor]]
"""Tensors one after the other, by name."""

Watch = Callable[[Stream, str, int], Stream]
"""Shows how far a stream of tensors is: given it, what it is, and how many tensors it has at
most."""


def grow_checkpoint(
    source: Checkpoint, plan: GrowthPlan, probe: Tensor | None = None
) -> Checkpoint:
    """The checkpoint after a growth: weights, optimizer state, and one more entry of lineage.

    Args:
        source: what is grown; not modified.
        plan: from its size to a larger one.
        probe: [B, T + 1] int64 token ids on which sameness is measured; random ones by default.

    Raises:
        DriftError: the result is not the same function.
    """
    grown = apply_growth(plan, source.weights, source.optimizer, probe)
    return _descendant(source, grown.config, grown.report, grown.weights, grown.optimizer)


def grow_on_disk(
    source: Checkpoint,
    plan: GrowthPlan,
    folder: Path,
    probe: Tensor | None = None,
    watch: Watch = lambda tensors, what, most: tensors,
) -> Checkpoint:
    """`grow_checkpoint` from disk to disk: in memory there is one tensor at a time, and for the
    verification of what was written one model.

    Args:
        source: loaded with `streamed`.
        plan: from its size to a larger one.
        folder: the grown checkpoint's own; must not exist yet, or be empty.
        probe: [B, T + 1] int64 token ids on which sameness is measured; random ones by default.
        watch: shows progress.

    Returns:
        The checkpoint as it lies on the disk, its tensors unread.

    Raises:
        DriftError: the result is not the same function; no checkpoint is left.
    """
    count = len(weight_shapes(plan.target))
    with atomic_directory(folder, layout.write_marker) as partial:
        weights = watch(grown_weights(plan, source.weights), "weights", count)
        stream_tensors(partial / layout.WEIGHTS, weights, count)
        written = TensorFile(partial / layout.WEIGHTS)
        report = growth_report(plan, verify_growth(plan, source.weights, written, probe))
        slots = count * len(ALL_SLOTS)
        moments = watch(grown_moments(plan, source.optimizer), "optimizer state", slots)
        stream_tensors(partial / layout.OPTIMIZER, moments, slots)
        write_records(partial, _descendant(source, plan.target, report))
    return load_checkpoint(folder, tensors=False)


def prune_checkpoint(
    source: Checkpoint, target: ModelConfig, text: Tensor, probe: Tensor
) -> Checkpoint:
    """The checkpoint with fewer parameter tokens, and one more entry of lineage.

    Args:
        source: what is pruned; not modified.
        target: of `plan_pruning`.
        text: [B, T + 1] int64 token ids on which tokens are ranked.
        probe: [B, T + 1] int64 token ids, others than `text`, on which the drift is measured.
    """
    config = as_tokenformer(source.config, "pruning takes away parameter tokens: it has none")
    before = generations(config, source.lineage)
    made = prune(config, target, source.weights, source.optimizer, text, probe)
    report = made.report | {RECORD: left_of(before, made.kept)}
    return _descendant(source, made.config, report, made.weights, made.optimizer)


def _descendant(
    source: Checkpoint,
    config: ModelConfig,
    report: dict[str, Any],
    weights: Mapping[str, Tensor] = NOTHING,
    optimizer: Mapping[str, Tensor] = NOTHING,
) -> Checkpoint:
    """The checkpoint of what was made of `source`: its lineage is one entry longer."""
    target = {"parameters": config.num_parameters(), "config": config.to_dict()}
    entry = LineageEntry.from_dict(
        {"source": asdict(source.lineage_source()), "target": target, **report}
    )
    times = source.times and replace(source.times, validation=None)
    return replace(
        source,
        config=config,
        weights=weights,
        optimizer=optimizer,
        lineage=(*source.lineage, entry),
        train_state=source.train_state and source.train_state.outside_run(),
        times=times,
        folder=None,
    )
