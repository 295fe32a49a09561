"""The figures of a report."""

import struct
from dataclasses import replace

import pytest
from arms import record

from tokengrow.checkpoint.schema import Rung
from tokengrow.reports.plots import (
    COLORS,
    cost_plot,
    flops_at_last_size,
    lines_of,
    loss_plots,
    spread,
    style,
)
from tokengrow.reports.run_data import Point, RunRecord, Spent


def rung(name: str, parameters: int, tokens: int, flops: float, drift: float | None) -> Rung:
    return Rung(
        name=name, parameters=parameters, tokens=tokens, flops=flops, loss_before=None,
        loss_start=6.0, loss_end=4.0, drift=drift, ends_at=None,
    )  # fmt: skip


@pytest.fixture
def ladder() -> RunRecord:
    """A run that was grown once, at 2e8 FLOPs."""
    rungs = rung("small", 28_736, 1000, 2e8, None), rung("large", 120_000, 500, 4e8, 3e-16)
    rows = [(0, 0, 0, 0.0, 6.2), (8, 0, 1000, 2e8, 5.1), (8, 1, 1000, 2e8, 5.1),
            (12, 1, 1500, 6e8, 4.5)]  # fmt: skip
    points = [
        Point(step=step, rung=index, tokens=tokens, flops=flops, seconds=float(step), loss=loss)
        for step, index, tokens, flops, loss in rows
    ]
    return record(
        "ladder", (1e3, 4.0), rungs=rungs, points=tuple(points), tokens=1500, flops=6e8,
        lineage=({"axis": "tokens"},),
    )  # fmt: skip


def size_of(png: bytes) -> tuple[int, ...]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 10_000, "it shows something"
    return struct.unpack(">II", png[16:24])


def test_a_run_has_its_loss_against_each_cost(ladder: RunRecord) -> None:
    plots = loss_plots([ladder])
    assert list(plots) == ["loss-vs-flops", "loss-vs-tokens", "loss-vs-time"]
    for png in plots.values():
        assert size_of(png) == (896, 640)  # 5.6 x 4.0 inches at 160 dpi


def test_runs_beside_each_other_have_the_end_as_well(ladder: RunRecord) -> None:
    plots = loss_plots([ladder, record("other", (1e8, 6.0), (5e8, 5.0))])
    assert "loss-vs-flops-end" in plots


def test_without_recorded_times_there_is_no_plot_of_them(ladder: RunRecord) -> None:
    points = tuple(replace(point, seconds=None) for point in ladder.points)
    assert "loss-vs-time" not in loss_plots([replace(ladder, points=points)])


def test_runs_that_were_not_validated_since_they_began_have_no_plot_of_their_loss() -> None:
    # A logarithmic axis has no 0, and no other validation is there yet.
    begun, other = record("begun", (0.0, 6.2)), record("other", (0.0, 6.3), (1e3, 5.0))
    assert loss_plots([begun]) == loss_plots([begun, begun]) == {}
    assert "loss-vs-flops" in loss_plots([begun, other])


def test_a_single_run_has_a_line_for_each_rung(ladder: RunRecord) -> None:
    small, large = lines_of([ladder])
    assert (small.label, large.label) == ("small, 28.7k", "large, 120k")
    assert [point.loss for point in small.points] == [6.2, 5.1]
    assert [point.loss for point in large.points] == [5.1, 4.5]
    assert (small.grown, [point.step for point in large.grown]) == ([], [8])


def test_each_of_several_runs_has_one_line_and_its_growths_marked(ladder: RunRecord) -> None:
    grown, other = lines_of([ladder, record("other", (1e3, 4.0))])
    assert (grown.label, len(grown.points)) == ("ladder", 4)
    assert [(point.rung, point.flops) for point in grown.grown] == [(1, 2e8)]
    assert other.grown == []


def test_the_plots_show_the_losses(ladder: RunRecord) -> None:
    worse = replace(
        ladder, points=tuple(replace(each, loss=each.loss + each.step) for each in ladder.points)
    )
    for name, png in loss_plots([ladder]).items():
        assert loss_plots([worse])[name] != png


def test_the_cost_at_the_last_size_alone_is_reckoned_from_its_tokens(ladder: RunRecord) -> None:
    # The last size took 4e8 FLOPs for 500 tokens; the run has trained on 1500.
    assert flops_at_last_size(ladder) == pytest.approx(1.2e9)
    before = Spent(tokens=500, flops=1e8)
    assert flops_at_last_size(replace(ladder, before=before)) == pytest.approx(1.6e9)
    assert flops_at_last_size(record("one size", (1e3, 4.0))) is None
    # Grown outside of any run, or in another one, and trained on since.
    (_, large) = ladder.rungs
    on = replace(
        ladder, rungs=(large,), tokens=500, flops=4e8, before=Spent(tokens=1000, flops=2e8)
    )
    assert flops_at_last_size(on) == pytest.approx(1.2e9)


def test_the_cost_plot_has_room_for_every_run(ladder: RunRecord) -> None:
    one, twelve = cost_plot([ladder]), cost_plot([ladder] * 12)
    assert size_of(one)[1] < size_of(twelve)[1]


def test_twelve_runs_look_different_in_colour_or_dashes() -> None:
    assert len({style(number) for number in range(12)}) == 12
    assert style(0)[1] != style(len(COLORS))[1]


def test_twelve_runs_with_long_names_are_drawn(ladder: RunRecord) -> None:
    runs = [replace(ladder, name=f"optim.lr=3e-4,model.layers={number}") for number in range(12)]
    rows = 13  # each name, and what a growth is marked with
    assert size_of(loss_plots(runs)["loss-vs-flops"]) == (896, round(160 * (4.0 + 0.225 * rows)))


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread([0.1, 0.5, 0.9], apart=0.1) == [0.1, 0.5, 0.9]
    assert spread([0.5, 0.5], apart=0.1) == pytest.approx([0.5, 0.6])
    assert spread([0.98, 0.99], apart=0.1) == pytest.approx([0.9, 1.0])
    assert spread([0.99, 0.1], apart=0.1) == [0.99, 0.1]  # in their order


def test_the_plots_leave_matplotlibs_global_state_alone(ladder: RunRecord) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_backend(), plt.get_fignums()
    loss_plots([ladder])
    assert (plt.get_backend(), plt.get_fignums()) == before
