"""Tests of the tables and data files of a report."""

import csv
import io
import json
from collections.abc import Sequence
from io import StringIO

import pytest
from report_runs import NAMES
from rich.console import Console

from tokengrow.checkpoint.schema import Rung
from tokengrow.reports.report import Report, points_csv, rung_table
from tokengrow.reports.run_data import RunRecord

SMALL = Rung(name="small", parameters=28_736, tokens=1_000, loss_start=6.25, loss_end=5.123456)
LARGE = Rung(
    name="large", parameters=1_234_567, tokens=500, loss_before=5.123456, loss_start=5.123456,
    loss_end=4.5, drift=3.3e-16,
)  # fmt: skip


def table_rows(rungs: Sequence[Rung]) -> list[list[str]]:
    """Return the words in each line of the printed table."""
    console = Console(width=200, record=True, file=StringIO())
    console.print(rung_table(rungs))
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_table_has_a_row_per_rung_with_five_decimals() -> None:
    *_, small, large = table_rows([SMALL, LARGE])
    assert small == ["small", "28,736", "1,000", "-", "6.25000", "5.12346", "-"]
    assert large == ["large", "1,234,567", "1,500", "5.12346", "5.12346", "4.50000", "3.3e-16"]


def test_table_has_a_title_and_headers() -> None:
    title, *header = table_rows([SMALL, LARGE])[:3]
    assert " ".join(title) == "Validation loss of each rung (nats per token)"
    assert header == [
        ["tokens", "before", "after", "end", "of", "max"],
        ["rung", "parameters", "seen", "growth", "growth", "stage", "|Δ", "logit|"],
    ]


def test_missing_loss_is_a_dash() -> None:
    unfinished = Rung(name="small", parameters=28_736, tokens=1_000, loss_start=6.25)
    *_, row = table_rows([unfinished])
    assert row[-2:] == ["-", "-"]


def test_points_are_a_csv_file(runs: dict[str, RunRecord]) -> None:
    rows = list(csv.DictReader(io.StringIO(points_csv(list(runs.values())).decode())))
    assert len(rows) == sum(len(run.points) for run in runs.values())
    row, point = rows[-1], runs["after"].points[-1]
    assert (row["run"], row["rung"], int(row["step"])) == ("after", "n12", 4)
    assert (float(row["flops"]), float(row["loss"])) == (point.flops, point.loss)


def test_content_is_json(runs: dict[str, RunRecord]) -> None:
    content = json.loads(json.dumps(Report("six", list(runs.values()), []).to_dict()))
    assert [run["name"] for run in content["runs"]] == list(NAMES)
    grown = content["runs"][1]
    assert grown["rungs"][1]["loss_before"] == grown["rungs"][0]["loss_end"]
    assert grown["total_flops"] == runs["grown"].flops
    # Only the last size on all tokens: FLOPs per token of n12, times the tokens of both stages.
    assert grown["flops_at_last_size"] == pytest.approx(2 * grown["rungs"][1]["flops"])
    assert len(content["ratios"]) == len(NAMES)


def test_json_keys_do_not_change(runs: dict[str, RunRecord]) -> None:
    content = Report("two", [runs["small"], runs["on"]], []).to_dict()
    assert list(content) == [
        "tokengrow", "written", "title", "notes", "runs", "rule", "ratios", "scores",
        "differences", "lineage",
    ]  # fmt: skip
    run = content["runs"][0]
    assert list(run) == [
        "name", "step", "stands", "before", "rungs", "points", "tokens", "flops", "seconds",
        "source", "sessions", "fingerprint", "parameters", "total_tokens", "total_flops",
        "total_seconds", "lowest_loss", "last_loss", "flops_at_last_size",
    ]  # fmt: skip
    assert list(run["before"]) == ["tokens", "flops", "seconds"]
    assert list(run["points"][0]) == ["step", "rung", "tokens", "flops", "seconds", "loss"]
    assert list(content["differences"][0]) == ["key", "values"]
    branch = content["lineage"][0]
    assert list(branch) == ["run", "start", "twigs"]
    assert list(branch["twigs"][0]) == ["text", "growth", "branches"]
