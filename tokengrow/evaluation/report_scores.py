"""What `tokengrow eval` found of the runs of a report: those that were asked the same, beside each
other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from tokengrow.evaluation.format import bytes_text, folded, table
from tokengrow.evaluation.report_data import RunRecord, Values
from tokengrow.evaluation.results import PERPLEXITY
from tokengrow.evaluation.scores import Score, figure_and_error, metric_text

COMPARABLE = ("bits_per_byte", "word_perplexity")
"""Figures of perplexity that compare whatever the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was found of one run."""

    value: float | None
    """As the results have it; None: no finite number."""
    error: float | None
    """Its standard error; None: there is none."""
    step: int
    """Of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found by the same questions, or on the same text."""

    task: str
    """The harness's name, or perplexity."""
    asked: str
    """How much, and how."""
    figures: dict[str, tuple[Figure | None, ...]]
    """Metric to its figure of each run; None: the run was not asked."""

    @property
    def answered(self) -> int:
        """How many runs were asked."""
        return max(sum(each is not None for each in row) for row in self.figures.values())


class _Asked(NamedTuple):
    """Equal where figures can be compared."""

    task: str
    asked: str
    exactly: str
    """All else that makes a figure another one."""


Found = dict[str, tuple[float | None, float | None]]
"""Metric to its value and the standard error of that."""


def compare_scores(runs: Sequence[RunRecord]) -> list[Scores]:
    """By task, perplexity last, and what more runs were asked first. Of each run the newest
    checkpoint counts that was asked, up to the one that the report shows."""
    figures: dict[_Asked, dict[str, list[Figure | None]]] = {}
    for index, run in enumerate(runs):
        for results in sorted(run.evaluations, key=_age):
            step = results["checkpoint"]["step"]
            for asked, found in _found(results):
                rows = figures.setdefault(asked, {})
                for metric, (value, error) in found.items():
                    row = rows.setdefault(metric, [None] * len(runs))
                    row[index] = Figure(value=value, error=error, step=step)
    made = [
        Scores(
            task=asked.task,
            asked=asked.asked,
            figures={metric: tuple(row) for metric, row in rows.items()},
        )
        for asked, rows in figures.items()
    ]
    return sorted(made, key=lambda each: (each.task == PERPLEXITY, each.task, -each.answered))


def _age(results: Values) -> tuple[int, str]:
    return results["checkpoint"]["step"], results["ran"]["began"]


def _found(results: Values) -> Iterator[tuple[_Asked, Found]]:
    """The figures of an evaluation, by what was asked."""
    settings = results["settings"]
    for score in (Score(**values) for values in results.get("scores", ())):
        amount = f"{score.samples:,} questions, {score.shots} shots"
        exactly = [score.version, settings.get("files", {}).get(score.task)]
        found = {score.metric: (score.value, score.error)}
        yield _Asked(score.task, amount, json.dumps(exactly)), found
    if PERPLEXITY in results:
        measured = results[PERPLEXITY]
        amount = (
            f"{bytes_text(measured['bytes'])}, windows of {measured['context_length']:,} tokens, "
            f"{measured['stride']:,} new"
        )
        exactly = [settings["data_sha256"], settings[PERPLEXITY]["split"], measured["bytes"]]
        found = {metric: (measured[metric], None) for metric in COMPARABLE}
        yield _Asked(PERPLEXITY, amount, json.dumps(exactly)), found


def score_table(scores: Scores, runs: Sequence[RunRecord]) -> Table:
    """A line for each run that was asked, a column for each metric."""
    headers = tuple(metric_text(metric) for metric in scores.figures)
    made = table(f"{scores.task} ({scores.asked})", "run", headers)
    for run, *figures in zip(runs, *scores.figures.values(), strict=True):
        if found := [figure for figure in figures if figure]:
            newest = found[0].step == run.step
            name = run.name if newest else f"{run.name}, step {found[0].step:,}"
            texts = (
                figure_and_error(metric, figure.value, figure.error) if figure else "-"
                for metric, figure in zip(scores.figures, figures, strict=True)
            )
            made.add_row(folded(name), *texts)
    return made
