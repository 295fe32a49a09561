"""Reports of runs: a page, its figures, a table of points and all facts as JSON; and the tables
that a terminal shows."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from tokengrow import __version__
from tokengrow.checkpoint.schema import Rung
from tokengrow.console.format import (
    empty_table,
    fold_name,
    format_count,
    format_power,
    format_small_number,
)
from tokengrow.files import is_stale_temporary, write_atomically
from tokengrow.reports.comparison import config_differences, lineage_tree, notes
from tokengrow.reports.compute_ratio import RULE, compute_ratios
from tokengrow.reports.page import duration, page
from tokengrow.reports.plots import cost_plot, flops_at_last_size, loss_plots
from tokengrow.reports.run_data import LeftOut, RunRecord, read_runs
from tokengrow.reports.score_comparison import Scores, compare_scores, score_table

PAGE, FACTS, POINTS = "index.html", "report.json", "points.csv"
FIGURES = ("loss-vs-flops", "loss-vs-flops-end", "loss-vs-tokens", "loss-vs-time", "cost")
"""PNGs, those that there are."""
NAMES = {PAGE, FACTS, POINTS, *(f"{name}.png" for name in FIGURES)}
"""All files that a report may have."""


@dataclass(frozen=True)
class Report:
    """What several runs show beside each other."""

    title: str
    """Of the page."""
    runs: Sequence[RunRecord]
    """In their order."""
    left_out: Sequence[LeftOut]
    """What it says nothing of."""

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "Report":
        """Reads runs.

        Args:
            paths: of runs, of checkpoints, or of folders of runs.

        Raises:
            UserError: a path that is none of these, or no run that has a checkpoint.
        """
        runs, left_out = read_runs(paths)
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs beside each other"
        return cls(title, runs, left_out)

    @property
    def notes(self) -> list[str]:
        """What keeps numbers from being compared, or is missing."""
        return notes(self.runs, self.left_out)

    def values(self) -> dict[str, Any]:
        """All facts, as JSON holds them."""
        return {
            "tokengrow": __version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "title": self.title,
            "notes": self.notes,
            "runs": [_facts(run) for run in self.runs],
            "rule": RULE,
            "ratios": compute_ratios(self.runs),
            "scores": [asdict(scores) for scores in self.scores],
            "differences": [asdict(each) for each in config_differences(self.runs)],
            "lineage": [asdict(each) for each in lineage_tree(self.runs)],
        }

    def write(self, folder: Path) -> Path:
        """Writes every file of the report, each whole or not at all; one of its name gives way.

        Returns:
            The page.
        """
        folder.mkdir(parents=True, exist_ok=True)
        values = self.values()
        figures = {**loss_plots(self.runs), "cost": cost_plot(self.runs)}
        contents = {FACTS: json.dumps(values, indent=1).encode()}  # first: it tells a report
        contents |= {f"{name}.png": png for name, png in figures.items()}
        contents[POINTS] = points_csv(self.runs)
        contents[PAGE] = page(values, figures).encode()
        for path in folder.iterdir():
            gone = path.name in NAMES - contents.keys()
            if gone or is_stale_temporary(path, NAMES):
                path.unlink()
        for name, content in contents.items():
            write_atomically(folder / name, content)
        return folder / PAGE

    @cached_property
    def scores(self) -> list[Scores]:
        """What `tokengrow eval` found of the runs."""
        return compare_scores(self.runs)

    def score_tables(self) -> list[Table]:
        """Of what several of the runs were asked, or of all where there is one."""
        least = min(2, len(self.runs))
        return [score_table(each, self.runs) for each in self.scores if each.answered >= least]

    def table(self) -> Table:
        """One line per run."""
        made = empty_table(
            "Runs (nats per token; costs with what lies behind a source)",
            "run",
            ("lowest\nloss", "last\nloss", "para-\nmeters", "tokens", "FLOPs", "wall\ntime"),
        )
        for run in self.runs:
            seconds = run.total_seconds
            made.add_row(
                fold_name(run.name),
                f"{run.lowest.loss:.4f}",
                f"{run.points[-1].loss:.4f}",
                format_count(run.rungs[-1].parameters),
                format_count(run.total_tokens),
                format_power(run.total_flops),
                "-" if seconds is None else duration(seconds),
            )
        return made


def _facts(run: RunRecord) -> dict[str, Any]:
    """Of one run: all that is read of it but its recipe, and what follows from it."""
    values = asdict(run)
    for key in ("folder", "config", "weights", "lineage", "evaluations"):
        del values[key]
    return {
        **values,
        "parameters": run.rungs[-1].parameters,
        "total_tokens": run.total_tokens,
        "total_flops": run.total_flops,
        "total_seconds": run.total_seconds,
        "lowest_loss": run.lowest.loss,
        "last_loss": run.points[-1].loss,
        "flops_at_last_size": flops_at_last_size(run),
    }


def points_csv(runs: Sequence[RunRecord]) -> bytes:
    """A row for each validation; costs are cumulative."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("run", "rung", "parameters", "step", "tokens", "flops", "seconds", "loss"))
    for run in runs:
        for point in run.points:
            rung = run.rungs[point.rung]
            costs = point.step, point.tokens, point.flops, point.seconds
            writer.writerow((run.name, rung.name, rung.parameters, *costs, point.loss))
    return text.getvalue().encode()


def rung_table(rungs: Sequence[Rung]) -> Table:
    """One row per rung: size, tokens, and validation loss before growth, right after, at the end.

    Args:
        rungs: rungs of a ladder, smallest first.
    """
    rows = empty_table(
        "Validation loss up the ladder (nats per token)",
        "rung",
        (
            "parameters",
            "tokens\nseen",
            "before\ngrowth",
            "after\ngrowth",
            "end of\nstage",
            "max\n|Δ logit|",
        ),
    )
    seen = 0
    for rung in rungs:
        seen += rung.tokens
        rows.add_row(
            rung.name,
            f"{rung.parameters:,}",
            f"{seen:,}",
            _loss(rung.loss_before),
            _loss(rung.loss_start),
            _loss(rung.loss_end),
            "-" if rung.drift is None else format_small_number(rung.drift),
        )
    return rows


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
