"""Tests of the plots of a report."""

import struct
from dataclasses import replace

import pytest
from report_runs import make_record

from tokengrow.checkpoint.schema import Rung
from tokengrow.reports.plots import (
    COLORS,
    flops_at_last_size,
    line_style,
    loss_curves,
    plot_costs,
    plot_losses,
    spread_positions,
)
from tokengrow.reports.run_data import LossPoint, PriorCost, RunRecord


def make_rung(name: str, parameters: int, tokens: int, flops: float, drift: float | None) -> Rung:
    return Rung(
        name=name, parameters=parameters, tokens=tokens, flops=flops, loss_before=None,
        loss_start=6.0, loss_end=4.0, drift=drift, ends_at=None,
    )  # fmt: skip


@pytest.fixture
def ladder() -> RunRecord:
    """Return a run with one growth, at 2e8 FLOPs."""
    small = make_rung("small", 28_736, 1000, 2e8, None)
    large = make_rung("large", 120_000, 500, 4e8, 3e-16)
    rows = [(0, 0, 0, 0.0, 6.2), (8, 0, 1000, 2e8, 5.1), (8, 1, 1000, 2e8, 5.1),
            (12, 1, 1500, 6e8, 4.5)]  # fmt: skip
    points = [
        LossPoint(step=step, rung=index, tokens=tokens, flops=flops, seconds=float(step), loss=loss)
        for step, index, tokens, flops, loss in rows
    ]
    return make_record(
        "ladder", (1e3, 4.0), rungs=(small, large), points=tuple(points), tokens=1500, flops=6e8,
        lineage=({"axis": "tokens"},),
    )  # fmt: skip


def png_size(png: bytes) -> tuple[int, ...]:
    """Return the width and height of a PNG file, pixels."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 10_000, "an empty figure is smaller"
    return struct.unpack(">II", png[16:24])


def test_run_has_a_plot_for_each_cost(ladder: RunRecord) -> None:
    plots = plot_losses([ladder])
    assert list(plots) == ["loss-vs-flops", "loss-vs-tokens", "loss-vs-time"]
    for png in plots.values():
        assert png_size(png) == (896, 640)  # 5.6 x 4.0 inches at 160 dpi


def test_several_runs_also_have_a_plot_of_the_last_part(ladder: RunRecord) -> None:
    plots = plot_losses([ladder, make_record("other", (1e8, 6.0), (5e8, 5.0))])
    assert "loss-vs-flops-end" in plots


def test_unrecorded_times_have_no_plot(ladder: RunRecord) -> None:
    points = tuple(replace(point, seconds=None) for point in ladder.points)
    assert "loss-vs-time" not in plot_losses([replace(ladder, points=points)])


def test_runs_with_only_their_first_validation_have_no_plot() -> None:
    # A logarithmic axis has no 0, and there is no other validation yet.
    begun = make_record("begun", (0.0, 6.2))
    other = make_record("other", (0.0, 6.3), (1e3, 5.0))
    assert plot_losses([begun]) == plot_losses([begun, begun]) == {}
    assert "loss-vs-flops" in plot_losses([begun, other])


def test_single_run_has_a_curve_per_rung(ladder: RunRecord) -> None:
    small, large = loss_curves([ladder])
    assert (small.label, large.label) == ("small, 28.7k", "large, 120k")
    assert [point.loss for point in small.points] == [6.2, 5.1]
    assert [point.loss for point in large.points] == [5.1, 4.5]
    assert (small.growths, [point.step for point in large.growths]) == ([], [8])


def test_several_runs_have_one_curve_each_with_growths(ladder: RunRecord) -> None:
    grown, other = loss_curves([ladder, make_record("other", (1e3, 4.0))])
    assert (grown.label, len(grown.points)) == ("ladder", 4)
    assert [(point.rung, point.flops) for point in grown.growths] == [(1, 2e8)]
    assert other.growths == []


def test_plots_depend_on_the_losses(ladder: RunRecord) -> None:
    worse = replace(
        ladder, points=tuple(replace(each, loss=each.loss + each.step) for each in ladder.points)
    )
    for name, png in plot_losses([ladder]).items():
        assert plot_losses([worse])[name] != png


def test_cost_of_only_the_last_size_uses_all_tokens(ladder: RunRecord) -> None:
    # The last size used 4e8 FLOPs for 500 tokens; the run has trained on 1500 tokens.
    assert flops_at_last_size(ladder) == pytest.approx(1.2e9)
    prior_cost = PriorCost(tokens=500, flops=1e8)
    assert flops_at_last_size(replace(ladder, prior_cost=prior_cost)) == pytest.approx(1.6e9)
    assert flops_at_last_size(make_record("one size", (1e3, 4.0))) is None
    # A run that continues a model grown in another run or outside of any run.
    (_, large) = ladder.rungs
    prior_cost = PriorCost(tokens=1000, flops=2e8)
    on = replace(ladder, rungs=(large,), tokens=500, flops=4e8, prior_cost=prior_cost)
    assert flops_at_last_size(on) == pytest.approx(1.2e9)


def test_cost_plot_grows_with_the_number_of_runs(ladder: RunRecord) -> None:
    one, twelve = plot_costs([ladder]), plot_costs([ladder] * 12)
    assert png_size(one)[1] < png_size(twelve)[1]


def test_twelve_runs_differ_in_colour_or_dashes() -> None:
    assert len({line_style(number) for number in range(12)}) == 12
    assert line_style(0)[1] != line_style(len(COLORS))[1]


def test_twelve_runs_with_long_names_have_a_legend(ladder: RunRecord) -> None:
    runs = [replace(ladder, name=f"optim.lr=3e-4,model.layers={number}") for number in range(12)]
    rows = 13  # one per name, and one for the marker of a growth
    assert png_size(plot_losses(runs)["loss-vs-flops"]) == (896, round(160 * (4.0 + 0.225 * rows)))


def test_labels_move_no_further_than_necessary() -> None:
    assert spread_positions([0.1, 0.5, 0.9], distance=0.1) == [0.1, 0.5, 0.9]
    assert spread_positions([0.5, 0.5], distance=0.1) == pytest.approx([0.5, 0.6])
    assert spread_positions([0.98, 0.99], distance=0.1) == pytest.approx([0.9, 1.0])
    assert spread_positions([0.99, 0.1], distance=0.1) == [0.99, 0.1]  # the order does not change


def test_plots_do_not_change_the_state_of_pyplot(ladder: RunRecord) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_backend(), plt.get_fignums()
    plot_losses([ladder])
    assert (plt.get_backend(), plt.get_fignums()) == before
