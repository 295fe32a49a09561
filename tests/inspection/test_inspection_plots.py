"""Plots of an inspection."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tokengrow.inspection.analysis import Inspection
from tokengrow.inspection.plots import plot_history, plot_tokens


@pytest.mark.parametrize(
    "plot",
    [
        lambda inspection, path: plot_tokens(inspection, path),
        lambda inspection, path: plot_history([inspection], path),
    ],
    ids=["tokens", "history"],
)
def test_plot_depends_on_activity(
    plot: Callable[[Inspection, Path], Path], grown: Inspection, tmp_path: Path
) -> None:
    image = plot(grown, tmp_path / "plot.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24])[0] == 1650  # 11 inches at 150 dpi
    layers = [
        replace(
            layer,
            activity=layer.activity
            and replace(layer.activity, contribution=[1.0, 2.0], dead=[1, 2]),
        )
        for layer in grown.layers
    ]
    other = plot(replace(grown, layers=layers), tmp_path / "other.png").read_bytes()
    assert other != image


def test_more_tokens_than_columns_are_plotted(grown: Inspection, tmp_path: Path) -> None:
    activity = {
        layer: replace(each, contribution=each.contribution.repeat(100))
        for layer, each in grown.activity.items()
    }
    layers = [
        replace(layer, tokens=[100 * count for count in layer.tokens]) for layer in grown.layers
    ]
    inspection = replace(grown, activity=activity, layers=layers)
    assert plot_tokens(inspection, tmp_path / "many.png").stat().st_size > 20_000
