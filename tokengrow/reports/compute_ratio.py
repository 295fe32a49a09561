"""FLOPs that a run needs to reach a loss, and the ratio of two runs at equal loss."""

import math
from collections.abc import Sequence
from dataclasses import replace

from tokengrow.reports.run_data import LossPoint, RunRecord

RATIO_RULE = (
    "A run has reached a loss at the first point where its lowest validation loss so far is at or "
    "below it. Between the two validations around the loss, this running minimum is interpolated "
    "linearly in the logarithm of the FLOPs. If the first of the two is at 0 FLOPs, the "
    "interpolation is linear in the FLOPs. FLOPs are cumulative: they include all stages and the "
    "source of a run. A loss below all validations of a run is not reached. Nothing is "
    "extrapolated."
)
"""Definition of the ratio, as shown on the page."""

Ratios = list[list[float | None]]
"""Ratios with one row and one column per run."""


def flops_to_reach(points: Sequence[LossPoint], loss: float) -> float | None:
    """Return the FLOPs at which a run reaches a loss, or None if it does not.

    Args:
        points: validations of the run, oldest first.
        loss: loss to reach, nats per token.
    """
    before: LossPoint | None = None
    for point in points:
        if point.loss <= loss:
            return point.flops if before is None else _interpolate_flops(before, point, loss)
        if before is None or point.loss < before.loss:
            before = point
        else:  # the running minimum does not change, but its cost is higher now
            before = replace(point, loss=before.loss)
    return None


def _interpolate_flops(before: LossPoint, after: LossPoint, loss: float) -> float:
    fraction = (before.loss - loss) / (before.loss - after.loss)
    if before.flops == 0:
        return fraction * after.flops
    return before.flops * math.exp(fraction * math.log(after.flops / before.flops))


def compute_ratios(runs: Sequence[RunRecord]) -> Ratios:
    """Return the FLOPs of each run to reach the lowest loss of each run, relative to the latter.

    Returns:
        Row r, column c: FLOPs of run r to reach the lowest loss of run c, divided by the FLOPs that
        run c needed. None: run r does not reach it.
    """
    return [[_compute_ratio(row, column) for column in runs] for row in runs]


def _compute_ratio(run: RunRecord, reference: RunRecord) -> float | None:
    loss = reference.best_point.loss
    flops = flops_to_reach(run.points, loss)
    reference_flops = flops_to_reach(reference.points, loss)
    return None if flops is None or not reference_flops else flops / reference_flops
