"""Figures of the lm-evaluation-harness's tasks, as a terminal shows them; read without the
harness."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tokengrow.console.format import table
from tokengrow.evaluation.published_scores import PublishedModel

IN_FOUR_PLACES = ("bits_per_byte", "bits per byte")
"""A metric whose differences are small: the harness's name of it, and our own."""


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


def score_table(scores: Sequence[Score], published: PublishedModel) -> Table:
    """A row for each figure, beside that of a published model where there is one.

    Args:
        scores: accuracies are shown in per cent.
        published: the model to hold them against.
    """
    headers = ("metric", "shots", "n", "value", "±", published.name.replace("-", "\n"))
    rows, task = table("Tasks", "task", headers), None
    for score in scores:
        first, task = score.task != task, score.task
        figure = None if score.shots else published.figures.get((score.task, score.metric))
        if figure is not None and is_percentage(score.metric):
            figure /= 100
        rows.add_row(
            score.task if first else "",
            metric_label(score.metric),
            str(score.shots) if first else "",
            f"{score.samples:,}" if first else "",
            *(format_value(score.metric, each) for each in (score.value, score.error, figure)),
        )
    return rows


def is_percentage(metric: str) -> bool:
    """Whether a metric is a share of 1, shown in per cent."""
    return metric.startswith(("acc", "exact_match", "f1"))


def metric_label(metric: str) -> str:
    """A metric's name with its unit."""
    return f"{metric} %" if is_percentage(metric) else metric


def format_value(metric: str, value: float | None) -> str:
    """A figure as people read it, in the unit of `metric_label`.

    Args:
        metric: the harness's name.
        value: as the harness gives it; None: a dash.
    """
    if value is None:
        return "-"
    if is_percentage(metric):
        return f"{100 * value:.1f}"
    if metric.startswith(IN_FOUR_PLACES):
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2e}"


def format_value_and_error(metric: str, value: float | None, error: float | None) -> str:
    """`49.3 ± 4.1`; the figure alone where it has no error, a dash where there is no figure."""
    shown = format_value(metric, value)
    return shown if value is None or error is None else f"{shown} ± {format_value(metric, error)}"
