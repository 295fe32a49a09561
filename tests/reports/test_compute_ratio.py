"""Tests of the compute ratio at equal loss, with examples calculated by hand."""

from math import sqrt

import pytest
from report_runs import make_record

from tokengrow.reports.compute_ratio import compute_ratios, flops_to_reach


def flops_at(loss: float, *points: tuple[float, float]) -> float | None:
    return flops_to_reach(make_record("run", *points).points, loss)


def test_loss_is_interpolated_linearly_in_log_flops() -> None:
    # 3 is halfway from 4 to 2, and 1e4 is halfway from 1e3 to 1e5 on a logarithmic axis.
    assert flops_at(3.0, (1e3, 4.0), (1e5, 2.0)) == pytest.approx(1e4)
    # 3.5 is a quarter of the distance: 1e3 * 100 ** 0.25.
    assert flops_at(3.5, (1e3, 4.0), (1e5, 2.0)) == pytest.approx(1e3 * sqrt(10))


def test_validated_loss_has_the_flops_of_its_validation() -> None:
    assert flops_at(2.0, (1e3, 4.0), (1e5, 2.0), (1e6, 1.0)) == pytest.approx(1e5)


def test_running_minimum_counts_and_a_bump_does_not() -> None:
    # The minimum is 4 up to 1e4 FLOPs; from there to 1e5 FLOPs it falls to 2.
    assert flops_at(3.0, (1e3, 4.0), (1e4, 5.0), (1e5, 2.0)) == pytest.approx(sqrt(1e4 * 1e5))


def test_jump_at_a_growth_has_no_cost_of_its_own() -> None:
    # The growth at 1e4 FLOPs raises the loss from 3 to 6; it is below 3 again between 1e4 and 1e5.
    points = (1e3, 4.0), (1e4, 3.0), (1e4, 6.0), (1e5, 2.0)
    assert flops_at(3.0, *points) == pytest.approx(1e4)
    assert flops_at(2.5, *points) == pytest.approx(sqrt(1e4 * 1e5))


def test_loss_below_all_validations_is_not_reached() -> None:
    assert flops_at(1.9, (1e3, 4.0), (1e5, 2.0)) is None


def test_loss_above_the_first_validation_is_reached_with_it() -> None:
    assert flops_at(5.0, (1e3, 4.0), (1e5, 2.0)) == 1e3


def test_loss_is_interpolated_linearly_in_flops_from_zero() -> None:
    assert flops_at(3.0, (0.0, 4.0), (1e4, 2.0)) == pytest.approx(5e3)


def test_ratio_divides_by_the_flops_of_the_reference_run() -> None:
    half = make_record("half", (1e3, 4.0), (1e5, 2.0))
    full = make_record("full", (1e3, 5.0), (2e4, 3.0))
    # `half` reaches 3 at 1e4 FLOPs, `full` at 2e4 FLOPs; `full` does not reach 2.
    assert compute_ratios([half, full]) == [[1.0, pytest.approx(0.5)], [None, 1.0]]
