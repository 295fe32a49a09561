"""Figures of the lm-evaluation-harness's tasks, as a terminal shows them; read without the
harness."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tokengrow.evaluation.format import table
from tokengrow.evaluation.published import Published


@dataclass(frozen=True)
class Score:
    """One figure of one task."""

    task: str
    """The harness's name."""
    metric: str
    """The harness's name, with the filter of the answers where it is not `none`."""
    value: float | None
    """As the harness gives it: an accuracy is a share of 1; None: no finite number."""
    error: float | None
    """Its standard error."""
    samples: int
    """Questions that were asked."""
    shots: int
    """Examples before each."""
    version: Any
    """Of the task's definition."""


def score_table(scores: Sequence[Score], published: Published) -> Table:
    """A row for each figure, beside that of a published model where there is one.

    Args:
        scores: accuracies are shown in per cent.
        published: the model to hold them against.
    """
    headers = ("metric", "shots", "n", "value", "±", published.name.replace("-", "\n"))
    rows, task = table("Tasks", "task", headers), None
    for score in scores:
        first, task = score.task != task, score.task
        share = in_per_cent(score.metric)
        scale = 100 if share else 1
        figure = None if score.shots else published.figures.get((score.task, score.metric))
        found = (number and number * scale for number in (score.value, score.error))
        rows.add_row(
            score.task if first else "",
            f"{score.metric} %" if share else score.metric,
            str(score.shots) if first else "",
            f"{score.samples:,}" if first else "",
            *("-" if number is None else _number(number, share) for number in (*found, figure)),
        )
    return rows


def in_per_cent(metric: str) -> bool:
    """Whether a metric is a share of 1."""
    return metric.startswith(("acc", "exact_match", "f1"))


def _number(value: float, share: bool) -> str:
    if share:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2e}"
