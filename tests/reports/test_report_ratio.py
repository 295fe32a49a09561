"""The compute ratio at equal loss, by examples worked by hand."""

from math import sqrt

import pytest
from arms import record

from tokengrow.reports.compute_ratio import compute_ratios, flops_to_reach


def reached(loss: float, *points: tuple[float, float]) -> float | None:
    return flops_to_reach(record("run", *points).points, loss)


def test_between_two_validations_loss_falls_linearly_in_the_logarithm() -> None:
    # 3 lies half way from 4 to 2, and 1e4 half way from 1e3 to 1e5 on a logarithmic axis.
    assert reached(3.0, (1e3, 4.0), (1e5, 2.0)) == pytest.approx(1e4)
    # 3.5: a quarter of the way, 1e3 * 100 ** 0.25.
    assert reached(3.5, (1e3, 4.0), (1e5, 2.0)) == pytest.approx(1e3 * sqrt(10))


def test_a_loss_that_was_validated_costs_what_it_had_cost_then() -> None:
    assert reached(2.0, (1e3, 4.0), (1e5, 2.0), (1e6, 1.0)) == pytest.approx(1e5)


def test_the_lowest_loss_so_far_counts_and_not_a_bump() -> None:
    # The minimum stays at 4 up to 1e4; from there to 1e5 it falls to 2.
    assert reached(3.0, (1e3, 4.0), (1e4, 5.0), (1e5, 2.0)) == pytest.approx(sqrt(1e4 * 1e5))


def test_a_jump_at_a_growth_costs_nothing_by_itself() -> None:
    # Grown at 1e4 FLOPs from 3 to 6; it is below 3 again on the way from 1e4 to 1e5.
    points = (1e3, 4.0), (1e4, 3.0), (1e4, 6.0), (1e5, 2.0)
    assert reached(3.0, *points) == pytest.approx(1e4)
    assert reached(2.5, *points) == pytest.approx(sqrt(1e4 * 1e5))


def test_a_loss_below_all_validations_is_not_reached() -> None:
    assert reached(1.9, (1e3, 4.0), (1e5, 2.0)) is None


def test_a_loss_above_the_first_validation_is_reached_with_it() -> None:
    assert reached(5.0, (1e3, 4.0), (1e5, 2.0)) == 1e3


def test_from_no_flops_it_falls_linearly_in_the_flops() -> None:
    assert reached(3.0, (0.0, 4.0), (1e4, 2.0)) == pytest.approx(5e3)


def test_a_ratio_is_that_of_the_flops_to_the_lowest_loss_of_the_other() -> None:
    half = record("half", (1e3, 4.0), (1e5, 2.0))
    full = record("full", (1e3, 5.0), (2e4, 3.0))
    # half reaches 3 at 1e4, full at 2e4; full never reaches 2.
    assert compute_ratios([half, full]) == [[1.0, pytest.approx(0.5)], [None, 1.0]]
