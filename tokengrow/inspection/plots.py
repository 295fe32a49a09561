"""The plots of `tokengrow inspect`: every parameter token at work, and new ones waking up.

Shapes: `N` parameter tokens, `L` layers, `G` generations.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokengrow.figures import empty_figure
from tokengrow.inspection.analysis import DEAD, Generation, Inspection, even_share, fractions
from tokengrow.inspection.tables import generation_name, nonempty_generations
from tokengrow.model.config import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 512
"""Most columns of a heat map: of more tokens, neighbours are averaged."""
LEAST, MOST = -6.0, 1.0
"""Range of the colours: contribution over the even share of a layer, powers of ten."""


def plot_tokens(found: Inspection, path: Path) -> Path:
    """Draws the contribution of every token, a row per layer, and the share of each generation.

    Args:
        found: with activity.
        path: of the PNG.
    """
    layers, several = found.checkpoint.config.layers, len(nonempty_generations(found)) > 1
    figure = empty_figure(11.0, 5 * (0.75 + min(0.11 * layers, 1.6)) + 0.8)
    ratios = (3, 1) if several else (1,)
    grid = figure.subplots(
        len(ROLES), len(ratios), sharey="row", width_ratios=ratios, squeeze=False
    )
    for role, (left, *right) in zip(ROLES, grid, strict=True):
        image = _heat_map(left, found, role)
        left.set_ylabel(f"{role}\nlayer")
        for axes in right:
            _dots(axes, found, role)
    grid[0][0].set_title("contribution of each parameter token", fontsize=10)
    grid[-1][0].set_xlabel("parameter token; white: where the tokens of a growth begin")
    if several:
        _same_scale(grid[:, 1])
        grid[0][1].set_title("by generation", fontsize=10)
        grid[-1][1].set_xlabel("% of the contribution")
    figure.colorbar(
        image, ax=list(grid[:, 0]), location="bottom", aspect=60, pad=0.02, extend="both",
        label=f"contribution over an even share, power of ten; dead: up to {math.log10(DEAD):.0f}",
    )  # fmt: skip
    handles = [
        _rectangle(generation, found.generations) for generation in nonempty_generations(found)
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=150)
    return path


def _heat_map(axes: "Axes", found: Inspection, role: str) -> Any:
    """[L, N] contributions over the even share of each layer, with the bounds of generations."""
    rows = [_relative(found.activity[at].contribution) for at in found.activity if at[1] == role]
    values = torch.stack(rows)  # [L, N]
    tokens = values.shape[1]
    binned = torch.nn.functional.adaptive_avg_pool1d(values[:, None], min(tokens, COLUMNS))[:, 0]
    image = axes.imshow(
        binned.log10().clamp(LEAST - 1, MOST + 1).numpy(),
        aspect="auto",
        interpolation="nearest",
        extent=(0, tokens, len(values) - 0.5, -0.5),
        cmap="magma",
        vmin=LEAST,
        vmax=MOST,
    )
    for layer in found.layers:
        if layer.role == role:
            ends = torch.tensor(layer.tokens).cumsum(0)[:-1].tolist()
            inner = [end for end in sorted(set(ends)) if 0 < end < tokens]
            axes.vlines(inner, layer.layer - 0.5, layer.layer + 0.5, color="white", linewidth=1.2)
    axes.set_yticks(range(len(values)) if len(values) <= 8 else range(0, len(values), 4))
    return image


def _relative(contribution: Tensor) -> Tensor:
    """[N] over the even share; zeros where nothing contributes."""
    return contribution / (even_share(contribution) or 1.0)


def _dots(axes: "Axes", found: Inspection, role: str) -> None:
    """The share of each generation, a dot, in every layer, on a logarithmic axis."""
    size = 6 if found.checkpoint.config.layers <= 8 else 3
    for layer in found.layers:
        if layer.role != role or layer.activity is None:
            continue
        shares = fractions(layer.activity.contribution)
        for generation in nonempty_generations(found):
            if share := shares[generation.number]:
                color = _color(generation, found.generations)
                axes.plot(100 * share, layer.layer, "o", color=color, markersize=size)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _same_scale(column: Iterable["Axes"]) -> None:
    """Shares of all roles from the least one, or 1 %, to all."""
    least = min(axes.get_xlim()[0] for axes in column)
    for axes in column:
        axes.set_xlim(min(least, 1), 200)


def plot_history(past: Sequence[Inspection], path: Path) -> Path:
    """Draws the share of each generation against the step, a panel per role, and what is dead.

    Args:
        past: of one run, oldest first, with activity.
        path: of the PNG.
    """
    newest = past[-1]
    figure = empty_figure(11.0, 6.5)
    panels = figure.subplots(2, 3, sharex=True).flatten()
    for generation in nonempty_generations(newest):
        number = generation.number
        there = [each for each in past if len(each.generations) > number]
        steps = [each.checkpoint.step for each in there]
        style = {
            "color": _color(generation, newest.generations),
            "marker": "o",
            "markersize": 2.5,
            "linewidth": 1.2,
        }
        for role, axes in zip(ROLES, panels, strict=False):
            axes.plot(steps, [100 * each.shares()[role][number] or None for each in there], **style)
        dead = [
            100 * each.dead_tokens()[number] / max(each.generations[number].tokens, 1)
            for each in there
        ]
        panels[-1].plot(steps, dead, label=_name(generation), **style)
    for role, axes in zip(ROLES, panels, strict=False):
        axes.set_title(f"{role}: % of the contribution", fontsize=10)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    panels[-1].set_title("% of dead tokens, all roles", fontsize=10)
    panels[-1].set_ylim(-3, 103)
    panels[-1].legend(title="came with", fontsize=8)
    grown = [entry.source.step for entry in newest.checkpoint.lineage]
    began = past[0].checkpoint.step
    for axes in panels:
        for step in grown[len(past[0].checkpoint.lineage) :]:
            axes.axvline(max(step, began), color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    for axes in panels[3:]:
        axes.set_xlabel("step (dotted: a growth)")
    figure.savefig(path, dpi=150)
    return path


def _name(generation: Generation) -> str:
    """`growth 2 (tokens)`: with the axes that brought tokens, as no lineage stands beside it."""
    axes = [axis for axis in generation.axes if axis in ("tokens", "depth")]
    return generation_name(generation) + (f" ({', '.join(axes)})" if axes else "")


def _color(generation: Generation, all_of_them: Sequence[Generation]) -> Any:
    """Dark for what is old, bright for what is new."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * generation.number / max(len(all_of_them) - 1, 1))


def _rectangle(generation: Generation, all_of_them: Sequence[Generation]) -> Any:
    """Of the legend."""
    from matplotlib.patches import Patch

    return Patch(color=_color(generation, all_of_them), label=_name(generation))
