"""What `tokengrow eval` found of the runs of a report: those that were asked the same, beside each
other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from tokengrow.console.format import empty_table, fold_name, format_bytes
from tokengrow.evaluation.results import PERPLEXITY
from tokengrow.evaluation.scores import Score, format_value_and_error, metric_label
from tokengrow.reports.run_data import RunRecord, Values

COMPARABLE = {"bits per byte": "bits_per_byte", "word perplexity": "word_perplexity"}
"""Figures of perplexity that compare whatever the tokenizer, to their keys in the results."""


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
    exactly: str
    """How much and how, and all else that makes a figure another one, as JSON."""


class _Found(NamedTuple):
    asked: _Asked
    words: str
    """How much, and how: the first of those that were asked the same says it."""
    metric: str
    figure: Figure


def compare_scores(runs: Sequence[RunRecord]) -> list[Scores]:
    """By task, perplexity last, and what more runs were asked first. Of each run the newest
    checkpoint counts that was asked, up to the one that the report shows."""
    answers: dict[_Asked, list[Answer | None]] = {}
    words: dict[_Asked, str] = {}
    for index, run in enumerate(runs):
        for results in sorted(run.evaluations, key=_age):
            step = results["checkpoint"]["step"]
            figures: dict[_Asked, dict[str, Figure]] = {}
            for found in (*_of_tasks(results), *_of_perplexity(results)):
                figures.setdefault(found.asked, {})[found.metric] = found.figure
                words.setdefault(found.asked, found.words)
            for asked, each in figures.items():
                row = answers.setdefault(asked, [None] * len(runs))
                row[index] = Answer(step=step, figures=each)
    made = [
        Scores(
            task=asked.task,
            asked=words[asked],
            answers=tuple(row),
            metrics=tuple(dict.fromkeys(m for each in row if each for m in each.figures)),
        )
        for asked, row in answers.items()
    ]
    return sorted(made, key=lambda each: (each.task == PERPLEXITY, each.task, -each.answered))


def _age(results: Values) -> tuple[int, str]:
    return results["checkpoint"]["step"], results["ran"]["began"]


def _of_tasks(results: Values) -> Iterator[_Found]:
    settings = results["settings"]
    for score in (Score(**values) for values in results.get("scores", ())):
        exactly = [
            score.samples,
            score.shots,
            score.version,
            settings.get("lm_eval"),  # prompts and examples are its own
            settings.get("files", {}).get(score.task),
        ]
        words = f"{score.samples:,} questions, {score.shots} shots"
        if not score.samples:  # a group of the harness, which counts the questions of its tasks
            limit = settings["limit"]
            words = "all questions" if limit is None else f"limit={limit:g}"
            exactly += [limit, settings["num_fewshot"]]
        figure = Figure(value=score.value, error=score.error)
        yield _Found(_Asked(score.task, json.dumps(exactly)), words, score.metric, figure)


def _of_perplexity(results: Values) -> Iterator[_Found]:
    if PERPLEXITY not in results:
        return
    found = results[PERPLEXITY]
    windows = found["context_length"], found["stride"]
    asked = _Asked(PERPLEXITY, json.dumps([found["text_sha256"], *windows]))
    words = "{}: {}; windows of {:,} tokens, {:,} new".format(
        _text_name(results["settings"]), format_bytes(found["bytes"]), *windows
    )
    for metric, key in COMPARABLE.items():
        yield _Found(asked, words, metric, Figure(value=found.get(key)))


def _text_name(settings: Values) -> str:
    """`books.txt, notes.txt, all`: the text of a perplexity, and which of its documents."""
    data, split = settings["data"], settings[PERPLEXITY]["split"]
    named = [data["store"]] if "store" in data else data.get("files") or [data.get("name")]
    names = [Path(each).name for each in named if each] or [data["source"]]
    return ", ".join([*names[:2], *["..."] * (len(names) > 2), split])


def score_table(scores: Scores, runs: Sequence[RunRecord]) -> Table:
    """A line for each run that was asked, a column for each metric."""
    headers = tuple(metric_label(metric).replace(" (", "\n(") for metric in scores.metrics)
    made = empty_table(f"{scores.task} ({scores.asked})".replace("; ", ";\n"), "run", headers)
    for run, answer in zip(runs, scores.answers, strict=True):
        if answer is not None:
            name = fold_name(run.name)
            if answer.step != run.step:
                name += f"\nstep {answer.step:,}"
            made.add_row(name, *(_text(metric, answer) for metric in scores.metrics))
    return made


def _text(metric: str, answer: Answer) -> str:
    figure = answer.figures.get(metric)
    return "-" if figure is None else format_value_and_error(metric, figure.value, figure.error)
