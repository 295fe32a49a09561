"""How much compute a run needs to reach a loss, and the ratio of two runs at equal loss."""

import math
from collections.abc import Sequence

from tokengrow.reports.run_data import Point, RunRecord

RULE = (
    "The rule: a run has reached a loss where the lowest of its validation losses so far is no "
    "higher. Between the two validations that bracket it, this running minimum is taken to fall "
    "linearly in the logarithm of the FLOPs (linearly in the FLOPs where the first of the two is "
    "at 0). FLOPs are cumulative: those of all stages, and those behind the checkpoint that a run "
    "started from. A loss below all validations of a run is not reached: nothing is extrapolated."
)
"""As the page states it."""

Ratios = list[list[float | None]]
"""A row for each run, in it a column for each."""


def flops_to_reach(points: Sequence[Point], loss: float) -> float | None:
    """FLOPs at which a run reaches a loss; None: it never does.

    Args:
        points: its validations, in their order.
        loss: nats per token.
    """
    before: Point | None = None
    for point in points:
        if point.loss <= loss:
            return point.flops if before is None else _between(before, point, loss)
        if before is None or point.loss < before.loss:
            before = point
        else:  # the minimum stays, and has cost more by now
            before = Point(**{**vars(point), "loss": before.loss})
    return None


def _between(before: Point, after: Point, loss: float) -> float:
    share = (before.loss - loss) / (before.loss - after.loss)
    if before.flops == 0:
        return share * after.flops
    return before.flops * math.exp(share * math.log(after.flops / before.flops))


def compute_ratios(runs: Sequence[RunRecord]) -> Ratios:
    """For runs r and c: FLOPs of r to reach the lowest loss of c, over those of c; None: r never
    gets there."""
    return [[_ratio(row, column) for column in runs] for row in runs]


def _ratio(run: RunRecord, other: RunRecord) -> float | None:
    needed = flops_to_reach(run.points, other.lowest.loss)
    there = flops_to_reach(other.points, other.lowest.loss)
    return None if needed is None or not there else needed / there
