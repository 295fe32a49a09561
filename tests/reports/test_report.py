"""The table of a ladder, as a terminal shows it."""

from io import StringIO
from typing import Any

from rich.console import Console

from tokengrow.reports.report import rung_table

RUNGS: list[dict[str, Any]] = [
    {
        "name": "small",
        "parameters": 28_736,
        "tokens": 1_000,
        "loss_before": None,
        "loss_start": 6.25,
        "loss_end": 5.123456,
        "drift": None,
    },
    {
        "name": "large",
        "parameters": 1_234_567,
        "tokens": 500,
        "loss_before": 5.123456,
        "loss_start": 5.123456,
        "loss_end": 4.5,
        "drift": 3.3e-16,
    },
]


def lines_of(rungs: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of the table as printed, cut at the spaces."""
    console = Console(width=200, record=True, file=StringIO())
    console.print(rung_table(rungs))
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_the_table_has_a_row_per_rung_with_losses_to_five_decimals() -> None:
    *_, small, large = lines_of(RUNGS)
    assert small == ["small", "28,736", "1,000", "-", "6.25000", "5.12346", "-"]
    assert large == ["large", "1,234,567", "1,500", "5.12346", "5.12346", "4.50000", "3.3e-16"]


def test_the_table_says_what_its_columns_are() -> None:
    title, *header = lines_of(RUNGS)[:3]
    assert " ".join(title) == "Validation loss up the ladder (nats per token)"
    assert header == [
        ["tokens", "before", "after", "end", "of", "max"],
        ["rung", "parameters", "seen", "growth", "growth", "stage", "|Δ", "logit|"],
    ]


def test_a_loss_that_is_not_there_yet_is_a_dash() -> None:
    *_, row = lines_of([{**RUNGS[0], "loss_end": None}])
    assert row[-2:] == ["-", "-"]
