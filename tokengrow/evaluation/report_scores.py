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
    """What was found by one metric."""

    value: float | None
    """As the results have it; None: no finite number."""
    error: float | None = None
    """Its standard error; None: there is none."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found of one run."""

    step: int
    """Of the checkpoint."""
    figures: dict[str, Figure]
    """By metric."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found by the same questions, or on the same text."""

    task: str
    """The harness's name, or perplexity."""
    asked: str
    """How much, and how."""
    answers: tuple[Answer | None, ...]
    """Of each run; None: it was not asked."""
    metrics: tuple[str, ...]
    """Those that any run has."""

    @property
    def answered(self) -> int:
        """How many runs were asked."""
        return sum(answer is not None for answer in self.answers)


class _Asked(NamedTuple):
    """Equal where figures can be compared."""

    task: str
    asked: str
    exactly: str
    """All else that makes a figure another one."""


def compare_scores(runs: Sequence[RunRecord]) -> list[Scores]:
    """By task, perplexity last, and what more runs were asked first. Of each run the newest
    checkpoint counts that was asked, up to the one that the report shows."""
    found: dict[_Asked, list[Answer | None]] = {}
    for index, run in enumerate(runs):
        for results in sorted(run.evaluations, key=_age):
            for asked, figures in _figures(results).items():
                answers = found.setdefault(asked, [None] * len(runs))
                answers[index] = Answer(step=results["checkpoint"]["step"], figures=figures)
    made = [
        Scores(
            task=asked.task,
            asked=asked.asked,
            answers=tuple(answers),
            metrics=tuple(dict.fromkeys(m for each in answers if each for m in each.figures)),
        )
        for asked, answers in found.items()
    ]
    return sorted(made, key=lambda each: (each.task == PERPLEXITY, each.task, -each.answered))


def _age(results: Values) -> tuple[int, str]:
    return results["checkpoint"]["step"], results["ran"]["began"]


def _figures(results: Values) -> dict[_Asked, dict[str, Figure]]:
    """The figures of an evaluation, by what was asked."""
    made: dict[_Asked, dict[str, Figure]] = {}
    for asked, metric, figure in (*_of_tasks(results), *_of_perplexity(results)):
        made.setdefault(asked, {})[metric] = figure
    return made


def _of_tasks(results: Values) -> Iterator[tuple[_Asked, str, Figure]]:
    settings = results["settings"]
    for score in (Score(**values) for values in results.get("scores", ())):
        exactly = [
            score.version,
            settings.get("lm_eval"),  # prompts and examples are its own
            settings.get("files", {}).get(score.task),
        ]
        asked = f"{score.samples:,} questions, {score.shots} shots"
        if not score.samples:  # a group of the harness, which counts the questions of its tasks
            limit = settings["limit"]
            asked = "all questions" if limit is None else f"limit={limit:g}"
            exactly.append(settings["num_fewshot"])
        figure = Figure(value=score.value, error=score.error)
        yield _Asked(score.task, asked, json.dumps(exactly)), score.metric, figure


def _of_perplexity(results: Values) -> Iterator[tuple[_Asked, str, Figure]]:
    if PERPLEXITY not in results:
        return
    settings, found = results["settings"], results[PERPLEXITY]
    asked = (
        f"{bytes_text(found['bytes'])}, windows of {found['context_length']:,} tokens, "
        f"{found['stride']:,} new"
    )
    exactly = json.dumps([settings["data_sha256"], settings[PERPLEXITY]["split"], found["bytes"]])
    for metric in COMPARABLE:
        yield _Asked(PERPLEXITY, asked, exactly), metric, Figure(value=found.get(metric))


def score_table(scores: Scores, runs: Sequence[RunRecord]) -> Table:
    """A line for each run that was asked, a column for each metric."""
    headers = tuple(metric_text(metric).replace(" (", "\n(") for metric in scores.metrics)
    made = table(f"{scores.task} ({scores.asked})", "run", headers)
    for run, answer in zip(runs, scores.answers, strict=True):
        if answer is not None:
            name = folded(run.name)
            if answer.step != run.step:
                name += f"\nstep {answer.step:,}"
            made.add_row(name, *(_text(metric, answer) for metric in scores.metrics))
    return made


def _text(metric: str, answer: Answer) -> str:
    figure = answer.figures.get(metric)
    return "-" if figure is None else figure_and_error(metric, figure.value, figure.error)
