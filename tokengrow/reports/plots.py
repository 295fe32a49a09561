"""PNG plots of a report, readable at a width of 350 pixels on a phone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

from tokengrow.console.format import fold_name, format_count, format_power
from tokengrow.figures import empty_figure
from tokengrow.reports.run_data import LossPoint, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
"""Colour-blind-safe palette of Okabe and Ito, without yellow, which is too light on white."""
DASHES = ("solid", "dashed", "dotted")
"""Line styles; the next one is used when all colours are used."""

SIZE, DPI = (5.6, 4.0), 160
"""Size of a figure in inches, and its resolution."""
FONT_SIZE, SMALL_FONT_SIZE = 11, 10
"""Font sizes in points; at this figure size they are about as large as text on a phone."""
GREY = "#777777"
LEGEND_ROW_HEIGHT = 0.225
"""Height that a row of the legend adds to a figure, inches."""

MAX_END_LABEL = 16
"""Maximum number of characters of a label at the end of its curve; longer ones need a legend."""
MAX_BAR_LABEL, MAX_LEGEND_LABEL = 24, 60
"""Maximum number of characters in one line of a name next to a bar, and in a legend."""

GROWTH_LABEL = "growth"
"""Label of the markers of growths."""

Png = bytes
"""Content of a PNG file."""
Cost = Callable[[LossPoint], float | None]
"""Function that returns a cost of a validation, or None if the cost is not recorded."""


@dataclass(frozen=True)
class LossCurve:
    """Curve of a plot: one run, or one rung of a single run."""

    label: str
    """Label in the plot."""
    style: int
    """Number of the combination of colour and dashes."""
    points: Sequence[LossPoint]
    """Validations, oldest first."""
    growths: Sequence[LossPoint]
    """First validation after each growth."""


def line_style(number: int) -> tuple[str, str]:
    """Return the colour and the dashes of a curve."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def loss_curves(runs: Sequence[RunRecord]) -> list[LossCurve]:
    """Return one curve per run, or one per rung for a single run."""
    if len(runs) == 1:
        return _rung_curves(runs[0])
    curves = []
    for number, run in enumerate(runs):
        first_points = {point.rung: point for point in reversed(run.points)}
        growths = [
            first_points[index]
            for index, rung in enumerate(run.rungs)
            if rung.drift is not None and index in first_points
        ]
        curves.append(LossCurve(run.name, number, run.points, growths))
    return curves


def _rung_curves(run: RunRecord) -> list[LossCurve]:
    curves = []
    for number, rung in enumerate(run.rungs):
        points = [point for point in run.points if point.rung == number]
        growths = points[:1] if rung.drift is not None else []
        label = f"{rung.name}, {format_count(rung.parameters)}"
        curves.append(LossCurve(label, number, points, growths))
    return curves


def plot_losses(runs: Sequence[RunRecord]) -> dict[str, Png]:
    """Plot validation loss against each cost.

    Several runs also get a plot of the last part of their FLOPs. A cost that no run has recorded is
    not plotted. Runs without a validation after their first update are not plotted either.

    Returns:
        File name without extension, mapped to the content of the file.
    """
    curves = loss_curves(runs)
    plots: dict[str, tuple[list[LossCurve], str, Cost]] = {
        "loss-vs-flops": (curves, "training FLOPs", lambda point: point.flops),
        "loss-vs-flops-end": (_curve_ends(curves), "training FLOPs", lambda point: point.flops),
        "loss-vs-tokens": (curves, "training tokens", lambda point: point.tokens),
        "loss-vs-time": (curves, "wall time, seconds", lambda point: point.seconds),
    }
    if len(runs) == 1:
        del plots["loss-vs-flops-end"]
    return {
        name: _plot_loss(shown, label, cost)
        for name, (shown, label, cost) in plots.items()
        if any(_plottable_points(curve.points, cost) for curve in shown)
    }


def _curve_ends(curves: Sequence[LossCurve]) -> list[LossCurve]:
    """Return the curves from a third of the smallest total FLOPs."""
    start = min(curve.points[-1].flops for curve in curves) / 3
    return [
        replace(
            curve,
            points=[point for point in curve.points if point.flops >= start],
            growths=[point for point in curve.growths if point.flops >= start],
        )
        for curve in curves
    ]


def _plot_loss(curves: Sequence[LossCurve], label: str, cost: Cost) -> Png:
    """Plot loss against a cost on a logarithmic axis, where equal distances are equal ratios."""
    figure, axes = _empty_axes()
    axes.set_xscale("log")
    growth_marker: dict[str, Any] = {
        "linestyle": "none", "marker": "D", "markersize": 6, "markerfacecolor": "white",
    }  # fmt: skip
    ends = []
    for curve in curves:
        points = _plottable_points(curve.points, cost)
        if not points:
            continue
        color, dashes = line_style(curve.style)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linestyle=dashes, linewidth=1.6,
                  label=fold_name(curve.label, MAX_LEGEND_LABEL),
                  marker=None if len(xs) > 60 else ".", markersize=4,
                  zorder=2.5 - 0.01 * curve.style)  # fmt: skip
        if growths := _plottable_points(curve.growths, cost):
            axes.plot(*zip(*growths, strict=True), **growth_marker, markeredgecolor=color, zorder=3)
        ends.append((xs[-1], ys[-1], curve.label, color))
    _set_x_ticks(axes, plain="seconds" in label)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    if any(curve.growths for curve in curves):
        axes.plot([], [], **growth_marker, markeredgecolor=GREY, label=GROWTH_LABEL)
    _label_curves(figure, axes, ends)
    return _png(figure)


def _plottable_points(points: Sequence[LossPoint], cost: Cost) -> list[tuple[float, float]]:
    """Return the (cost, loss) points that a logarithmic axis can show: those after training."""
    return [(x, point.loss) for point in points if point.tokens and (x := cost(point))]


def _set_x_ticks(axes: "Axes", plain: bool) -> None:
    """Label powers of ten, and numbers between them if the axis has few powers of ten.

    Args:
        axes: axes with their final limits.
        plain: whether to write `50,000` instead of `5e4`.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first, last = axes.get_xlim()
    multiples = (1.0, 2.0, 5.0) if last / first < 50 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=multiples))
    axes.xaxis.set_minor_formatter(NullFormatter())
    format_tick = "{:,g}".format if plain else _short_power
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_tick(x)))


def _short_power(number: float) -> str:
    """Format a number as a power of ten without trailing zeros: 50_000 as `5e4`."""
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _label_curves(
    figure: "Figure", axes: "Axes", ends: Sequence[tuple[float, float, str, str]]
) -> None:
    """Label the curves at their ends, or in a legend below the axes if a label is too long.

    Args:
        figure: figure, which becomes higher if it has a legend.
        axes: axes with the curves.
        ends: x, y, label and colour of the last point of each curve.
    """
    longest = max((len(label) for *_, label, _ in ends), default=0)
    if longest > MAX_END_LABEL:
        columns = 1 if longest > MAX_BAR_LABEL else 2
        legend = figure.legend(loc="outside lower center", ncols=columns, fontsize=SMALL_FONT_SIZE)
        lines = sum(text.get_text().count("\n") + 1 for text in legend.get_texts())
        figure.set_figheight(SIZE[1] + LEGEND_ROW_HEIGHT * math.ceil(lines / columns))
        return
    figure.canvas.draw()  # sets the final position of the axes
    pixels = axes.transData.transform([(x, y) for x, y, *_ in ends])[:, 1]
    height = axes.bbox.height
    positions = spread_positions([(y - axes.bbox.y0) / height for y in pixels], distance=0.062)
    for (x, y, label, color), position in zip(ends, positions, strict=True):
        axes.annotate(
            label, (x, y), xytext=(1.02, position), textcoords="axes fraction", color=color,
            va="center", fontsize=SMALL_FONT_SIZE, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.8},
        )  # fmt: skip
    handles = [h for h in axes.get_legend_handles_labels()[0] if h.get_label() == GROWTH_LABEL]
    if handles:
        axes.legend(handles=handles, loc="upper right", fontsize=SMALL_FONT_SIZE)


def spread_positions(positions: Sequence[float], distance: float) -> list[float]:
    """Move positions in [0, 1] as little as necessary, so that none are closer than `distance`.

    If [0, 1] is too short for all of them, they extend past 1.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    low = 0.0
    for index in order:
        moved[index] = low = max(positions[index], low)
        low += distance
    high = max(1.0, distance * (len(positions) - 1))
    for index in reversed(order):
        moved[index] = high = min(moved[index], high)
        high -= distance
    return moved


def plot_costs(runs: Sequence[RunRecord]) -> Png:
    """Plot the FLOPs of each run as a bar with one part per rung, after those of its source.

    A mark shows the FLOPs of training only the last size on as many tokens. The total FLOPs and the
    lowest loss are written next to the axes, where no mark crosses them.
    """
    figure, axes = _empty_axes(height=1.5 + 0.5 * len(runs))
    max_flops = 0.0
    for number, run in enumerate(runs):
        left = run.prior_cost.flops or 0.0
        axes.barh(number, left, left=0.0, color=GREY, edgecolor="white", height=0.6, alpha=1.0)
        for index, rung in enumerate(run.rungs):
            # The shade of a rung is darker the later the rung.
            shade = 1.0 if len(run.rungs) == 1 else 0.45 + 0.55 * index / (len(run.rungs) - 1)
            axes.barh(number, rung.flops, left=left, color=line_style(number)[0],
                      edgecolor="white", height=0.6, alpha=shade)  # fmt: skip
            left += rung.flops
        axes.text(1.02, number, f"{format_power(left)}\nloss {run.best_point.loss:.3f}",
                  va="center", fontsize=SMALL_FONT_SIZE,
                  transform=axes.get_yaxis_transform())  # fmt: skip
        last_size_flops = flops_at_last_size(run)
        if last_size_flops is not None:
            ends = [number - 0.38, number + 0.38]
            axes.plot([last_size_flops] * 2, ends, color="black", linewidth=1.5)
        max_flops = max(max_flops, run.total_flops, last_size_flops or 0.0)
    axes.set_yticks(range(len(runs)), [fold_name(run.name, MAX_BAR_LABEL) for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(right=1.03 * max_flops)
    axes.set_xlabel("training FLOPs, cumulative")
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda x, _: _short_power(x) if x else "0")
    return _png(figure)


def flops_at_last_size(run: RunRecord) -> float | None:
    """Calculate the FLOPs of training only the last size on all tokens of a run and its source.

    Returns:
        FLOPs; None if the run has only one size, or no update of the last one.
    """
    last = run.rungs[-1]
    if not last.tokens or not run.lineage:
        return None
    return run.total_tokens * last.flops / last.tokens


def _empty_axes(height: float = SIZE[1]) -> tuple["Figure", "Axes"]:
    figure = empty_figure(SIZE[0], height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.label.set_fontsize(FONT_SIZE)
    axes.yaxis.label.set_fontsize(FONT_SIZE)
    axes.tick_params(labelsize=SMALL_FONT_SIZE)
    return figure, axes


def _png(figure: "Figure") -> Png:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
