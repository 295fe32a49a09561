"""Plots of `tokengrow inspect`: contribution of every parameter token, and shares over training.

Shapes: `N` parameter tokens, `L` layers, `G` generations.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokengrow.figures import empty_figure
from tokengrow.inspection.analysis import DEAD, Generation, Inspection, even_share, fractions
from tokengrow.inspection.tables import generation_name, nonempty_generations
from tokengrow.model.config import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MAX_COLUMNS = 512
"""Maximum columns of a heat map; neighbouring tokens are averaged if there are more."""
MIN_EXPONENT, MAX_EXPONENT = -6.0, 1.0
"""Range of the colours: contribution over the even share of a layer, as powers of ten."""


def plot_tokens(inspection: Inspection, path: Path) -> Path:
    """Plot the contribution of every token by layer, and the share of each generation.

    Args:
        inspection: inspection with activity.
        path: PNG file to write.

    Returns:
        `path`.
    """
    layers, shown = inspection.checkpoint.config.layers, nonempty_generations(inspection)
    figure = empty_figure(11.0, 5 * (0.75 + min(0.11 * layers, 1.6)) + 0.8)
    ratios = (3, 1) if len(shown) > 1 else (1,)
    grid = figure.subplots(
        len(ROLES), len(ratios), sharey="row", width_ratios=ratios, squeeze=False
    )
    for role, (left, *right) in zip(ROLES, grid, strict=True):
        image = _plot_heat_map(left, inspection, role)
        left.set_ylabel(f"{role}\nlayer")
        for axes in right:
            _plot_shares(axes, inspection, role)
    grid[0][0].set_title("contribution of each parameter token", fontsize=10)
    grid[-1][0].set_xlabel("parameter token; white: first token of each growth")
    if len(shown) > 1:
        _unify_x_limits(grid[:, 1])
        grid[0][1].set_title("by generation", fontsize=10)
        grid[-1][1].set_xlabel("% of the contribution")
    figure.colorbar(
        image, ax=list(grid[:, 0]), location="bottom", aspect=60, pad=0.02, extend="both",
        label=f"contribution over an even share, power of ten; dead: up to {math.log10(DEAD):.0f}",
    )  # fmt: skip

    from matplotlib.patches import Patch

    handles = [
        Patch(color=_color(each, inspection.generations), label=_legend_label(each))
        for each in shown
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=150)
    return path


def _plot_heat_map(axes: "Axes", inspection: Inspection, role: str) -> "AxesImage":
    """Plot contributions [L, N] over the even share of each layer, and the generation borders."""
    rows = [
        _relative_contribution(activity.contribution)
        for (_, own), activity in inspection.activity.items()
        if own == role
    ]
    values = torch.stack(rows)  # [L, N]
    tokens = values.shape[1]
    columns = min(tokens, MAX_COLUMNS)
    binned = torch.nn.functional.adaptive_avg_pool1d(values[:, None], columns)[:, 0]
    image = axes.imshow(
        binned.log10().clamp(MIN_EXPONENT - 1, MAX_EXPONENT + 1).numpy(),
        aspect="auto",
        interpolation="nearest",
        extent=(0, tokens, len(values) - 0.5, -0.5),
        cmap="magma",
        vmin=MIN_EXPONENT,
        vmax=MAX_EXPONENT,
    )
    for layer in inspection.layers:
        if layer.role == role:
            ends = torch.tensor(layer.tokens).cumsum(0)[:-1].tolist()
            inner = [end for end in sorted(set(ends)) if 0 < end < tokens]
            axes.vlines(inner, layer.layer - 0.5, layer.layer + 0.5, color="white", linewidth=1.2)
    axes.set_yticks(range(len(values)) if len(values) <= 8 else range(0, len(values), 4))
    return image


def _relative_contribution(contribution: Tensor) -> Tensor:
    """Divide contributions [N] by the even share; return zeros if no token contributes."""
    return contribution / (even_share(contribution) or 1.0)


def _plot_shares(axes: "Axes", inspection: Inspection, role: str) -> None:
    """Plot the share of each generation in every layer as a dot, on a logarithmic axis."""
    size = 6 if inspection.checkpoint.config.layers <= 8 else 3
    for layer in inspection.layers:
        if layer.role != role or layer.activity is None:
            continue
        shares = fractions(layer.activity.contribution)
        for generation in nonempty_generations(inspection):
            if share := shares[generation.number]:
                color = _color(generation, inspection.generations)
                axes.plot(100 * share, layer.layer, "o", color=color, markersize=size)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _unify_x_limits(column: Iterable["Axes"]) -> None:
    """Set one range for all roles, from the smallest share, at most 1 %, to all."""
    smallest = min(axes.get_xlim()[0] for axes in column)
    for axes in column:
        axes.set_xlim(min(smallest, 1), 200)


def plot_history(inspections: Sequence[Inspection], path: Path) -> Path:
    """Plot shares against the step, one panel per role, and the percentage of dead tokens.

    Args:
        inspections: inspections of one run with activity, oldest first.
        path: PNG file to write.

    Returns:
        `path`.
    """
    newest = inspections[-1]
    figure = empty_figure(11.0, 6.5)
    panels = figure.subplots(2, 3, sharex=True).flatten()
    for generation in nonempty_generations(newest):
        _plot_generation_history(panels, inspections, generation)
    for role, axes in zip(ROLES, panels, strict=False):
        axes.set_title(f"{role}: % of the contribution", fontsize=10)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    panels[-1].set_title("% of dead tokens, all roles", fontsize=10)
    panels[-1].set_ylim(-3, 103)
    panels[-1].legend(title="generation", fontsize=8)
    growth_steps = [entry.source.step for entry in newest.checkpoint.lineage]
    first = inspections[0].checkpoint
    for axes in panels:
        for step in growth_steps[len(first.lineage) :]:
            axes.axvline(max(step, first.step), color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    for axes in panels[3:]:
        axes.set_xlabel("step (dotted: a growth)")
    figure.savefig(path, dpi=150)
    return path


def _plot_generation_history(
    panels: Sequence["Axes"], inspections: Sequence[Inspection], generation: Generation
) -> None:
    """Plot the shares of one generation by role, and its dead tokens in the last panel."""
    number = generation.number
    present = [each for each in inspections if len(each.generations) > number]
    steps = [each.checkpoint.step for each in present]
    color = _color(generation, inspections[-1].generations)
    for role, axes in zip(ROLES, panels, strict=False):
        # A share of 0 is omitted from the logarithmic axis.
        shares = [100 * each.shares()[role][number] or math.nan for each in present]
        axes.plot(steps, shares, color=color, marker="o", markersize=2.5, linewidth=1.2)
    dead = [
        100 * each.dead_tokens()[number] / max(each.generations[number].tokens, 1)
        for each in present
    ]
    label = _legend_label(generation)
    panels[-1].plot(
        steps, dead, label=label, color=color, marker="o", markersize=2.5, linewidth=1.2
    )


def _legend_label(generation: Generation) -> str:
    """Return `growth 2 (tokens)`, with the axes that added tokens."""
    axes = [axis for axis in generation.axes if axis in ("tokens", "depth")]
    return generation_name(generation) + (f" ({', '.join(axes)})" if axes else "")


def _color(
    generation: Generation, generations: Sequence[Generation]
) -> tuple[float, float, float, float]:
    """Return a colour between dark for the oldest generation and bright for the newest."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * generation.number / max(len(generations) - 1, 1))
