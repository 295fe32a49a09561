"""The figures of a report: PNGs that are still read when a phone shows them 350 pixels wide."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from tokengrow.console.format import fold_name, format_count, format_power
from tokengrow.figures import empty_figure
from tokengrow.reports.run_data import Point, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
"""Okabe and Ito's, which colour-blind readers tell apart, without the yellow that white drowns."""
DASHES = ("solid", "dashed", "dotted")
"""When the colours are used up they begin again, with the next of these."""

SIZE, DPI = (5.6, 4.0), 160
"""Inches. Text of 11 points in so small a figure is about as large as a phone's own."""
FONT, SMALL = 11, 10
GREY = "#777777"
ROW = 0.225
"""Inches of a legend's row, which the figure is higher for."""

DIRECT = 16
"""Characters of the longest name that still stands at the end of its line, and not in a legend."""

LABEL, LEGEND = 24, 60
"""Characters of a line of a name beside a bar, and in a legend."""

Png = bytes
Cost = Callable[[Point], float | None]
"""Of a validation; None: not recorded."""


@dataclass(frozen=True)
class Line:
    """A line of a plot: one run, or of a single run one rung."""

    label: str
    """Its name."""
    style: int
    """Which of the colours and dashes."""
    points: Sequence[Point]
    """In their order."""
    grown: Sequence[Point]
    """Those at which it was grown."""


def style(number: int) -> tuple[str, str]:
    """Colour and dashes of a line."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def lines_of(runs: Sequence[RunRecord]) -> list[Line]:
    """One line per run; a single run has one per rung, each from where the one before ended."""
    if len(runs) > 1:
        return [
            Line(run.name, number, run.points, _growths(run)) for number, run in enumerate(runs)
        ]
    (run,) = runs
    lines = []
    for number, rung in enumerate(run.rungs):
        points = [point for point in run.points if point.rung == number]
        grown = points[:1] if rung.drift is not None else []
        label = f"{rung.name}, {format_count(rung.parameters)}"
        lines.append(Line(label, number, points, grown))
    return lines


def _growths(run: RunRecord) -> list[Point]:
    """The validation right after each growth."""
    firsts = {point.rung: point for point in reversed(run.points)}
    return [firsts[n] for n, rung in enumerate(run.rungs) if rung.drift is not None and n in firsts]


def loss_plots(runs: Sequence[RunRecord]) -> dict[str, Png]:
    """Validation loss against each cost: name of the file, without its ending, to its content.

    Beside each other, runs also get the last part of their FLOPs alone. A cost that no run has
    recorded has no plot, nor have runs that were not validated since they began.
    """
    lines = lines_of(runs)
    wanted: dict[str, tuple[list[Line], str, Cost]] = {
        "loss-vs-flops": (lines, "training FLOPs", lambda point: point.flops),
        "loss-vs-flops-end": (_ends(lines), "training FLOPs", lambda point: point.flops),
        "loss-vs-tokens": (lines, "training tokens", lambda point: point.tokens),
        "loss-vs-time": (lines, "wall time, seconds", lambda point: point.seconds),
    }
    if len(runs) == 1:
        del wanted["loss-vs-flops-end"]
    return {
        name: _loss_plot(shown, label, cost)
        for name, (shown, label, cost) in wanted.items()
        if any(_on_axis(line.points, cost) for line in shown)
    }


def _ends(lines: Sequence[Line]) -> list[Line]:
    """What each line shows from a third of the smallest total cost on."""
    first = min(line.points[-1].flops for line in lines) / 3
    return [
        Line(
            line.label,
            line.style,
            [point for point in line.points if point.flops >= first],
            [point for point in line.grown if point.flops >= first],
        )
        for line in lines
    ]


def _loss_plot(lines: Sequence[Line], label: str, cost: Cost) -> Png:
    """Loss against a cost on a logarithmic axis, where equal ratios are equal distances."""
    figure, axes = _figure()
    axes.set_xscale("log")
    ends = []
    for line in lines:
        shown = _on_axis(line.points, cost)
        if not shown:
            continue
        color, dashes = style(line.style)
        xs, ys = zip(*shown, strict=True)
        many = len(xs) > 60
        axes.plot(xs, ys, color=color, linestyle=dashes, linewidth=1.6,
                  label=fold_name(line.label, LEGEND), marker=None if many else ".", markersize=4,
                  zorder=2.5 - 0.01 * line.style)  # fmt: skip
        if grown := _on_axis(line.grown, cost):
            axes.plot(*zip(*grown, strict=True), linestyle="none", marker="D", markersize=6,
                      markerfacecolor="white", markeredgecolor=color, zorder=3)  # fmt: skip
        ends.append((xs[-1], ys[-1], line.label, color))
    _ticks(axes, plain="seconds" in label)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    if any(line.grown for line in lines):
        axes.plot([], [], linestyle="none", marker="D", markersize=6, markerfacecolor="white",
                  markeredgecolor=GREY, label="grown here")  # fmt: skip
    _label(figure, axes, ends)
    return _png(figure)


def _on_axis(points: Sequence[Point], cost: Cost) -> list[tuple[float, float]]:
    """(cost, loss) of what a logarithmic axis can show: not of a model that was never trained."""
    return [(x, point.loss) for point in points if point.tokens and (x := cost(point))]


def _ticks(axes: "Axes", plain: bool) -> None:
    """Labels at powers of ten, and between them where there are few: `5e10`, or plain seconds."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first, last = axes.get_xlim()
    between = (1.0, 2.0, 5.0) if last / first < 50 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=between))
    axes.xaxis.set_minor_formatter(NullFormatter())
    written = "{:,g}".format if plain else _power_of_ten
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: written(x)))


def _power_of_ten(number: float) -> str:
    """50_000 is `5e4`."""
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _label(figure: "Figure", axes: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names the lines where they end; names that are too long for that, in a legend below."""
    longest = max((len(label) for *_, label, _ in ends), default=0)
    if longest > DIRECT:
        columns = 1 if longest > LABEL else 2
        legend = figure.legend(loc="outside lower center", ncols=columns, fontsize=SMALL)
        lines = sum(text.get_text().count("\n") + 1 for text in legend.get_texts())
        rows = math.ceil(lines / columns)
        figure.set_figheight(SIZE[1] + ROW * rows)
        return
    figure.canvas.draw()  # decides where the axes end
    pixels = axes.transData.transform([(x, y) for x, y, *_ in ends])[:, 1]
    height = axes.bbox.height
    places = spread([(y - axes.bbox.y0) / height for y in pixels], apart=0.062)
    for (x, y, label, color), place in zip(ends, places, strict=True):
        axes.annotate(
            label, (x, y), xytext=(1.02, place), textcoords="axes fraction", color=color,
            va="center", fontsize=SMALL, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.8},
        )  # fmt: skip
    handles = [h for h in axes.get_legend_handles_labels()[0] if h.get_label() == "grown here"]
    if handles:
        axes.legend(handles=handles, loc="upper right", fontsize=SMALL)


def spread(places: Sequence[float], apart: float) -> list[float]:
    """The places, moved as little as it takes to lie `apart` from each other, within [0, 1]."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    room = max(1.0, apart * (len(places) - 1))
    moved = list(places)
    low = 0.0
    for index in order:
        moved[index] = low = max(places[index], low)
        low += apart
    high = room
    for index in reversed(order):
        moved[index] = high = min(moved[index], high)
        high -= apart
    return moved


def cost_plot(runs: Sequence[RunRecord]) -> Png:
    """A bar for each run: the FLOPs of its rungs on top of what lies behind its source, and a mark
    where the last size alone would be after as many tokens; beside the axes the sum and the loss,
    where no mark strikes them through."""
    figure, axes = _figure(height=1.5 + 0.5 * len(runs))
    for number, run in enumerate(runs):
        left = 0.0
        parts = [("", run.before.flops or 0.0), *((r.name, r.flops) for r in run.rungs)]
        for index, (_, flops) in enumerate(parts):
            face = GREY if index == 0 else style(number)[0]
            axes.barh(number, flops, left=left, color=face, edgecolor="white", height=0.6,
                      alpha=1.0 if index == 0 else _shade(index, len(parts) - 1))  # fmt: skip
            left += flops
        axes.text(1.02, number, f"{format_power(left)}\nloss {run.lowest.loss:.3f}", va="center",
                  fontsize=SMALL, transform=axes.get_yaxis_transform())  # fmt: skip
        if (at_once := flops_at_last_size(run)) is not None:
            axes.plot([at_once] * 2, [number - 0.38, number + 0.38], color="black", linewidth=1.5)
    axes.set_yticks(range(len(runs)), [fold_name(run.name, LABEL) for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(right=1.03 * max(_reach(runs)))
    axes.set_xlabel("training FLOPs, cumulative")
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda x, _: _power_of_ten(x) if x else "0")
    return _png(figure)


def flops_at_last_size(run: RunRecord) -> float | None:
    """FLOPs of training the last size alone on all tokens of the run, those behind its source too,
    reckoned, not measured; None where there was one size alone, or no update of the last one."""
    last = run.rungs[-1]
    if not last.tokens or not run.lineage:
        return None
    return run.total_tokens * last.flops / last.tokens


def _reach(runs: Sequence[RunRecord]) -> Iterable[float]:
    for run in runs:
        yield max(run.total_flops, flops_at_last_size(run) or 0.0)


def _shade(index: int, parts: int) -> float:
    """The later a rung, the darker."""
    return 1.0 if parts == 1 else 0.45 + 0.55 * (index - 1) / (parts - 1)


def _figure(height: float = SIZE[1]) -> tuple["Figure", "Axes"]:
    figure = empty_figure(SIZE[0], height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.label.set_fontsize(FONT)
    axes.yaxis.label.set_fontsize(FONT)
    axes.tick_params(labelsize=SMALL)
    return figure, axes


def _png(figure: "Figure") -> Png:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
