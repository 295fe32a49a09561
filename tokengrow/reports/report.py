"""Reports on runs: HTML page, plots, CSV and JSON files, and tables for a terminal."""

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
    format_duration,
    format_power,
    format_small_number,
)
from tokengrow.files import is_stale_temporary, write_atomically
from tokengrow.reports.comparison import comparability_notes, config_differences, lineage_tree
from tokengrow.reports.compute_ratio import RATIO_RULE, compute_ratios
from tokengrow.reports.page import render_page
from tokengrow.reports.plots import flops_at_last_size, plot_costs, plot_losses
from tokengrow.reports.run_data import RunRecord, SkippedPath, read_runs
from tokengrow.reports.score_comparison import ScoreComparison, compare_scores, score_table

PAGE_FILE, JSON_FILE, POINTS_FILE = "index.html", "report.json", "points.csv"
"""Names of the page, of the JSON file with its content, and of the table of validations."""
PLOTS = ("loss-vs-flops", "loss-vs-flops-end", "loss-vs-tokens", "loss-vs-time", "cost")
"""Names of the plots without their extension; a report may lack some of them."""
REPORT_FILES = {PAGE_FILE, JSON_FILE, POINTS_FILE, *(f"{name}.png" for name in PLOTS)}
"""Names of all files that a report may have."""


@dataclass(frozen=True)
class Report:
    """Report on one run, or comparison of several runs."""

    title: str
    """Title of the page."""
    runs: Sequence[RunRecord]
    """Runs in the order of the page."""
    skipped: Sequence[SkippedPath]
    """Runs and results files that the report does not include."""

    @classmethod
    def from_paths(cls, paths: Sequence[Path]) -> "Report":
        """Read runs from disk.

        Args:
            paths: directories of runs or checkpoints, or directories that hold runs.

        Raises:
            UserError: a path is not one of these, or no run has a checkpoint.
        """
        runs, skipped = read_runs(paths)
        title = runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs"
        return cls(title, runs, skipped)

    @property
    def notes(self) -> list[str]:
        """Sentences on missing data, and on numbers that are not comparable."""
        return comparability_notes(self.runs, self.skipped)

    @cached_property
    def score_comparisons(self) -> list[ScoreComparison]:
        """Comparisons of the `tokengrow eval` results of the runs."""
        return compare_scores(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the report as JSON values."""
        return {
            "tokengrow": __version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "title": self.title,
            "notes": self.notes,
            "runs": [_run_to_dict(run) for run in self.runs],
            "rule": RATIO_RULE,
            "ratios": compute_ratios(self.runs),
            "scores": [comparison.to_dict() for comparison in self.score_comparisons],
            "differences": [asdict(each) for each in config_differences(self.runs)],
            "lineage": [branch.to_dict() for branch in lineage_tree(self.runs)],
        }

    def write(self, folder: Path) -> Path:
        """Write the files of the report, each atomically, and delete those of an earlier report.

        Returns:
            Path of the page.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        plots = {**plot_losses(self.runs), "cost": plot_costs(self.runs)}
        # The JSON file is the first one because it identifies the directory of a report.
        files = {JSON_FILE: json.dumps(content, indent=1).encode()}
        files |= {f"{name}.png": png for name, png in plots.items()}
        files[POINTS_FILE] = points_csv(self.runs)
        files[PAGE_FILE] = render_page(content, plots).encode()
        for path in folder.iterdir():
            obsolete = path.name in REPORT_FILES - files.keys()
            if obsolete or is_stale_temporary(path, REPORT_FILES):
                path.unlink()
        for name, data in files.items():
            write_atomically(folder / name, data)
        return folder / PAGE_FILE

    def score_tables(self) -> list[Table]:
        """Return tables of the scores that at least two runs share, or of all for a single run."""
        min_runs = min(2, len(self.runs))
        return [
            score_table(each, self.runs)
            for each in self.score_comparisons
            if each.evaluated_runs >= min_runs
        ]

    def run_table(self) -> Table:
        """Return a table with one row per run."""
        table = empty_table(
            "Runs (loss in nats per token; costs include those of the source)",
            "run",
            ("lowest\nloss", "last\nloss", "para-\nmeters", "tokens", "FLOPs", "wall\ntime"),
        )
        for run in self.runs:
            seconds = run.total_seconds
            table.add_row(
                fold_name(run.name),
                f"{run.best_point.loss:.4f}",
                f"{run.points[-1].loss:.4f}",
                format_count(run.rungs[-1].parameters),
                format_count(run.total_tokens),
                format_power(run.total_flops),
                "-" if seconds is None else format_duration(seconds),
            )
        return table


def _run_to_dict(run: RunRecord) -> dict[str, Any]:
    """Return the data of a run, without its recipe, and the values derived from them."""
    return {
        "name": run.name,
        "step": run.step,
        "stands": run.status,
        "before": asdict(run.prior_cost),
        "rungs": [asdict(rung) for rung in run.rungs],
        "points": [asdict(point) for point in run.points],
        "tokens": run.tokens,
        "flops": run.flops,
        "seconds": run.seconds,
        "source": asdict(run.source) if run.source else None,
        "sessions": run.sessions,
        "fingerprint": run.fingerprint,
        "parameters": run.rungs[-1].parameters,
        "total_tokens": run.total_tokens,
        "total_flops": run.total_flops,
        "total_seconds": run.total_seconds,
        "lowest_loss": run.best_point.loss,
        "last_loss": run.points[-1].loss,
        "flops_at_last_size": flops_at_last_size(run),
    }


def points_csv(runs: Sequence[RunRecord]) -> bytes:
    """Return a CSV file with one row per validation; costs are cumulative."""
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
    """Return a table with one row per rung: size, tokens, drift and validation losses.

    Args:
        rungs: rungs of a ladder, smallest first.
    """
    table = empty_table(
        "Validation loss of each rung (nats per token)",
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
    tokens = 0
    for rung in rungs:
        tokens += rung.tokens
        losses = rung.loss_before, rung.loss_start, rung.loss_end
        table.add_row(
            rung.name,
            f"{rung.parameters:,}",
            f"{tokens:,}",
            *("-" if loss is None else f"{loss:.5f}" for loss in losses),
            "-" if rung.drift is None else format_small_number(rung.drift),
        )
    return table
