"""The table and the plot of a ladder."""

import struct
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from tokengrow.evaluation.report import plot_loss_against_flops, rung_table

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
VALIDATION = [
    {"stage": 0, "step": 0, "tokens": 0, "flops": 0.0, "loss": 6.25},
    {"stage": 0, "step": 8, "tokens": 1_000, "flops": 2e8, "loss": 5.123456},
    {"stage": 1, "step": 8, "tokens": 1_000, "flops": 2e8, "loss": 5.123456},
    {"stage": 1, "step": 12, "tokens": 1_500, "flops": 4e9, "loss": 4.5},
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


def test_the_plot_is_a_png_of_1200_by_720(tmp_path: Path) -> None:
    path = plot_loss_against_flops(RUNGS, VALIDATION, tmp_path / "plot.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 720)  # 8 x 4.8 inches at 150 dpi
    assert len(content) > 10_000, "it shows something"


def test_the_plot_shows_the_losses(tmp_path: Path) -> None:
    plot = plot_loss_against_flops(RUNGS, VALIDATION, tmp_path / "plot.png").read_bytes()
    worse = [{**row, "loss": row["loss"] + row["step"]} for row in VALIDATION]
    assert plot_loss_against_flops(RUNGS, worse, tmp_path / "worse.png").read_bytes() != plot


def test_the_plot_leaves_matplotlibs_global_state_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_backend(), plt.get_fignums()
    plot_loss_against_flops(RUNGS, VALIDATION, tmp_path / "plot.png")
    assert (plt.get_backend(), plt.get_fignums()) == before
