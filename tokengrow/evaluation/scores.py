"""Scores of lm-evaluation-harness tasks and their table; this module does not need the harness."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from tokengrow.console.format import empty_table
from tokengrow.evaluation.published_scores import PublishedModel

FOUR_DECIMALS = ("bits_per_byte", "bits per byte")
"""Names, in the harness and in tokengrow, of a metric that is shown with four decimals."""


@dataclass(frozen=True)
class Score:
    """Value of one metric of one task."""

    task: str
    """Name of the task in the harness."""
    metric: str
    """Name of the metric in the harness, with the name of its filter if that is not `none`."""
    value: float | None
    """Value that the harness returns; an accuracy is a fraction of 1. None: not a finite number."""
    error: float | None
    """Standard error of the value; None: not available."""
    samples: int
    """Number of questions."""
    shots: int
    """Number of examples before each question."""
    version: int | float | str | None
    """Version of the task definition."""


def score_table(scores: Sequence[Score], published: PublishedModel) -> Table:
    """Build a table with one row per score and the published score next to it.

    Args:
        scores: scores to show, accuracies in per cent.
        published: model of the last column; it has zero-shot scores only.
    """
    headers = ("metric", "shots", "n", "value", "±", published.name.replace("-", "\n"))
    rows, task = empty_table("Tasks", "task", headers), None
    for score in scores:
        first, task = score.task != task, score.task
        reported = None if score.shots else published.scores.get((score.task, score.metric))
        if reported is not None and is_percentage(score.metric):
            reported /= 100
        rows.add_row(
            score.task if first else "",
            metric_label(score.metric),
            str(score.shots) if first else "",
            f"{score.samples:,}" if first else "",
            *(format_value(score.metric, each) for each in (score.value, score.error, reported)),
        )
    return rows


def is_percentage(metric: str) -> bool:
    """Return whether a metric is a fraction of 1 that is shown in per cent."""
    return metric.startswith(("acc", "exact_match", "f1"))


def metric_label(metric: str) -> str:
    """Return the name of a metric with its unit."""
    return f"{metric} %" if is_percentage(metric) else metric


def format_value(metric: str, value: float | None) -> str:
    """Format a value in the unit of `metric_label`; None becomes a dash.

    Args:
        metric: name of the metric in the harness.
        value: value as the harness returns it.
    """
    if value is None:
        return "-"
    if is_percentage(metric):
        return f"{100 * value:.1f}"
    if metric.startswith(FOUR_DECIMALS):
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2e}"


def format_value_and_error(metric: str, value: float | None, error: float | None) -> str:
    """Format a value and its standard error, for example `49.3 ± 4.1`.

    Without an error the result is the value; without a value it is a dash.
    """
    shown = format_value(metric, value)
    return shown if value is None or error is None else f"{shown} ± {format_value(metric, error)}"
