"""Tables and plots of a run, from the plain rows that its checkpoints keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tokengrow.evaluation.format import count, table

Rows = Sequence[Mapping[str, Any]]


def rung_table(rungs: Rows) -> Table:
    """One row per rung: size, tokens, and validation loss before growth, right after, at the end.

    Args:
        rungs: `tokengrow.training.state.Rung` as dicts.
    """
    rows = table(
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
        seen += rung["tokens"]
        rows.add_row(
            rung["name"],
            f"{rung['parameters']:,}",
            f"{seen:,}",
            _loss(rung["loss_before"]),
            _loss(rung["loss_start"]),
            _loss(rung["loss_end"]),
            "-" if rung["drift"] is None else f"{rung['drift']:.1e}",
        )
    return rows


def plot_loss_against_flops(rungs: Rows, validation: Rows, path: Path) -> Path:
    """Draws validation loss against training FLOPs, one colour per rung, growths marked.

    Args:
        rungs: `tokengrow.training.state.Rung` as dicts.
        validation: `TrainState.validation`.
        path: of the PNG.
    """
    # Imported here: it takes half a second that no other command should pay. The object interface
    # with its own canvas leaves the user's pyplot state and backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, rung in enumerate(rungs):
        rows = [row for row in validation if row["stage"] == index]
        flops = [row["flops"] for row in rows]
        label = f"{rung['name']} ({count(rung['parameters'])} parameters)"
        axes.plot(flops, [row["loss"] for row in rows], marker="o", markersize=3, label=label)
        if index and rows:
            axes.axvline(flops[0], color="grey", linestyle=":", linewidth=1)
            top = axes.get_xaxis_transform()  # x in FLOPs, y from 0 to 1
            axes.text(flops[0], 0.98, " grown", transform=top, fontsize=8, color="grey", va="top")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
