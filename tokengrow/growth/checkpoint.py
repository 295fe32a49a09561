"""Growth and pruning of a checkpoint, in memory or from disk to disk."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tokengrow.checkpoint import layout
from tokengrow.checkpoint.schema import LineageEntry
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, write_records
from tokengrow.checkpoint.tensors import TensorFile, stream_tensors
from tokengrow.files import atomic_directory
from tokengrow.growth.engine import apply_growth, grow_weights, growth_report, verify_growth
from tokengrow.growth.generations import GENERATIONS_KEY, count_generations, count_kept
from tokengrow.growth.moments import ALL_SLOTS, grow_optimizer_state
from tokengrow.growth.plan import GrowthPlan
from tokengrow.growth.prune import apply_pruning
from tokengrow.model.architectures import as_tokenformer
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import weight_shapes

NO_TENSORS: Mapping[str, Tensor] = {}
"""Tensors of a checkpoint of which only the records exist in memory."""

TensorStream = Iterable[tuple[str, Tensor]]
"""Iterable of (name, tensor)."""

TrackProgress = Callable[[TensorStream, str, int], TensorStream]
"""Function that wraps a stream and displays its progress.

It takes the stream, a description and the maximum number of tensors."""


def grow_checkpoint(
    source: Checkpoint, plan: GrowthPlan, probe: Tensor | None = None
) -> Checkpoint:
    """Grow a checkpoint: its weights, its optimizer state, and its lineage by one entry.

    Args:
        source: checkpoint before the growth; not modified.
        plan: growth from its size to a larger one.
        probe: [B, T + 1] int64 token ids on which the drift is measured; random ones by default.

    Raises:
        DriftError: the grown model is not the same function.
    """
    grown = apply_growth(plan, source.weights, source.optimizer, probe)
    return _derived_checkpoint(source, grown.config, grown.report, grown.weights, grown.optimizer)


def grow_checkpoint_on_disk(
    source: Checkpoint,
    plan: GrowthPlan,
    folder: Path,
    probe: Tensor | None = None,
    track: TrackProgress = lambda tensors, description, total: tensors,
) -> Checkpoint:
    """Grow a checkpoint from disk to disk, tensor by tensor.

    The growth has one tensor in memory at a time. The verification of the written checkpoint has
    one model in memory at a time.

    Args:
        source: checkpoint loaded with `streamed`.
        plan: growth from its size to a larger one.
        folder: directory of the grown checkpoint; must be empty or not exist.
        probe: [B, T + 1] int64 token ids on which the drift is measured; random ones by default.
        track: displays progress.

    Returns:
        The grown checkpoint on disk, without its tensors.

    Raises:
        DriftError: the grown model is not the same function; no checkpoint is written.
    """
    count = len(weight_shapes(plan.target))
    with atomic_directory(folder, layout.write_marker) as partial:
        weights = track(grow_weights(plan, source.weights), "weights", count)
        stream_tensors(partial / layout.WEIGHTS, weights, count)
        written = TensorFile(partial / layout.WEIGHTS)
        report = growth_report(plan, verify_growth(plan, source.weights, written, probe))
        slots = count * len(ALL_SLOTS)
        moments = track(grow_optimizer_state(plan, source.optimizer), "optimizer state", slots)
        stream_tensors(partial / layout.OPTIMIZER, moments, slots)
        write_records(partial, _derived_checkpoint(source, plan.target, report))
    return load_checkpoint(folder, tensors=False)


def prune_checkpoint(
    source: Checkpoint, target: ModelConfig, text: Tensor, probe: Tensor
) -> Checkpoint:
    """Remove parameter tokens from a checkpoint, and extend its lineage by one entry.

    Args:
        source: checkpoint before the pruning; not modified.
        target: config that `plan_pruning` returned.
        text: [B, T + 1] int64 token ids on which tokens are ranked.
        probe: [B, T + 1] int64 token ids, different from `text`, on which the drift is measured.
    """
    config = as_tokenformer(source.config, "Only parameter tokens can be pruned.")
    before = count_generations(config, source.lineage)
    pruned = apply_pruning(config, target, source.weights, source.optimizer, text, probe)
    report = pruned.report | {GENERATIONS_KEY: count_kept(before, pruned.kept)}
    return _derived_checkpoint(source, pruned.config, report, pruned.weights, pruned.optimizer)


def _derived_checkpoint(
    source: Checkpoint,
    config: ModelConfig,
    report: dict[str, Any],
    weights: Mapping[str, Tensor] = NO_TENSORS,
    optimizer: Mapping[str, Tensor] = NO_TENSORS,
) -> Checkpoint:
    """Return the checkpoint of a model made from `source`, with one more entry of lineage."""
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
