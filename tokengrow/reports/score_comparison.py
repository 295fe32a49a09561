"""Comparison of the `tokengrow eval` results of several runs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from tokengrow.console.format import empty_table, fold_name, format_bytes
from tokengrow.evaluation.results import PERPLEXITY
from tokengrow.evaluation.scores import Score, format_value_and_error, metric_label
from tokengrow.reports.run_data import JSONObject, RunRecord

PERPLEXITY_METRICS = {"bits per byte": "bits_per_byte", "word perplexity": "word_perplexity"}
"""Metrics that are comparable between tokenizers, mapped to their keys in the results."""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """Value of one metric."""

    value: float | None
    """Value in the results; None: not a finite number."""
    error: float | None = None
    """Standard error; None: not available."""


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """Scores of one run in one task."""

    step: int
    """Step of the evaluated checkpoint."""
    values: dict[str, MetricValue]
    """Value of each metric."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        values = {metric: asdict(value) for metric, value in self.values.items()}
        return {"step": self.step, "figures": values}


@dataclass(frozen=True, kw_only=True)
class ScoreComparison:
    """Scores of runs that were evaluated on the same questions or the same text."""

    task: str
    """Name of the task in the harness, or `perplexity`."""
    setting: str
    """Description of the questions or the text."""
    scores: tuple[RunScores | None, ...]
    """Scores of each run; None: the run was not evaluated."""
    metrics: tuple[str, ...]
    """Metrics of at least one run."""

    @property
    def evaluated_runs(self) -> int:
        """Number of evaluated runs."""
        return sum(scores is not None for scores in self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "task": self.task,
            "asked": self.setting,
            "answers": [scores.to_dict() if scores else None for scores in self.scores],
            "metrics": self.metrics,
        }


class _Setting(NamedTuple):
    """Key of an evaluation; equal keys mean comparable scores."""

    task: str
    """Name of the task."""
    conditions: str
    """Conditions that influence a score, as JSON."""


class _Entry(NamedTuple):
    """Value of one metric in a results file."""

    setting: _Setting
    description: str
    """Description of the questions or the text; runs of one setting share the first one."""
    metric: str
    value: MetricValue


def compare_scores(runs: Sequence[RunRecord]) -> list[ScoreComparison]:
    """Group the evaluations of runs by task and setting.

    For each run, the newest evaluated checkpoint up to the last one shown counts.

    Returns:
        The comparisons by task, perplexity last; those with more runs first within a task.
    """
    scores_by_setting: dict[_Setting, list[RunScores | None]] = {}
    descriptions: dict[_Setting, str] = {}
    for index, run in enumerate(runs):
        by_age = sorted(run.evaluations, key=lambda r: (r["checkpoint"]["step"], r["ran"]["began"]))
        for results in by_age:
            values: dict[_Setting, dict[str, MetricValue]] = {}
            for entry in (*_task_entries(results), *_perplexity_entries(results)):
                values.setdefault(entry.setting, {})[entry.metric] = entry.value
                descriptions.setdefault(entry.setting, entry.description)
            for setting, each in values.items():
                row = scores_by_setting.setdefault(setting, [None] * len(runs))
                row[index] = RunScores(step=results["checkpoint"]["step"], values=each)
    comparisons = [
        ScoreComparison(
            task=setting.task,
            setting=descriptions[setting],
            scores=tuple(row),
            metrics=tuple(dict.fromkeys(m for each in row if each for m in each.values)),
        )
        for setting, row in scores_by_setting.items()
    ]
    return sorted(comparisons, key=lambda c: (c.task == PERPLEXITY, c.task, -c.evaluated_runs))


def _task_entries(results: JSONObject) -> Iterator[_Entry]:
    settings = results["settings"]
    for score in (Score(**values) for values in results.get("scores", ())):
        conditions = [
            score.samples,
            score.shots,
            score.version,
            settings.get("lm_eval"),  # the harness version determines prompts and examples
            settings.get("files", {}).get(score.task),
        ]
        description = f"{score.samples:,} questions, {score.shots} shots"
        if not score.samples:  # a group of the harness, whose tasks hold the number of questions
            limit = settings["limit"]
            description = "all questions" if limit is None else f"limit={limit:g}"
            conditions += [limit, settings["num_fewshot"]]
        setting = _Setting(score.task, json.dumps(conditions))
        value = MetricValue(value=score.value, error=score.error)
        yield _Entry(setting, description, score.metric, value)


def _perplexity_entries(results: JSONObject) -> Iterator[_Entry]:
    if PERPLEXITY not in results:
        return
    values = results[PERPLEXITY]
    windows = values["context_length"], values["stride"]
    setting = _Setting(PERPLEXITY, json.dumps([values["text_sha256"], *windows]))
    description = "{}: {}; windows of {:,} tokens, {:,} new".format(
        _text_name(results["settings"]), format_bytes(values["bytes"]), *windows
    )
    for metric, key in PERPLEXITY_METRICS.items():
        yield _Entry(setting, description, metric, MetricValue(value=values.get(key)))


def _text_name(settings: JSONObject) -> str:
    """Return the files and the split of a measured text, as in `books.txt, notes.txt, all`."""
    data, split = settings["data"], settings[PERPLEXITY]["split"]
    paths = [data["store"]] if "store" in data else data.get("files") or [data.get("name")]
    names = [Path(path).name for path in paths if path] or [data["source"]]
    return ", ".join([*names[:2], *["..."] * (len(names) > 2), split])


def score_table(comparison: ScoreComparison, runs: Sequence[RunRecord]) -> Table:
    """Return a table with a row per evaluated run and a column per metric."""
    headers = tuple(metric_label(metric).replace(" (", "\n(") for metric in comparison.metrics)
    title = f"{comparison.task} ({comparison.setting})".replace("; ", ";\n")
    table = empty_table(title, "run", headers)
    for run, scores in zip(runs, comparison.scores, strict=True):
        if scores is None:
            continue
        name = fold_name(run.name)
        if scores.step != run.step:
            name += f"\nstep {scores.step:,}"
        cells = []
        for metric in comparison.metrics:
            each = scores.values.get(metric)
            cells.append(format_value_and_error(metric, each.value, each.error) if each else "-")
        table.add_row(name, *cells)
    return table
