"""Times: the middle of several calls, one of each function in turn."""

import math
import time

import pytest
import torch

from tokengrow.bench.timing import Timing, relative_error, time_steps, time_together

CPU = torch.device("cpu")


def test_a_timing_has_the_middle_and_the_fifths_of_its_calls() -> None:
    timing = Timing.of([float(ms) for ms in range(1, 12)])  # 1 to 11
    assert (timing.p20, timing.median, timing.p80) == (3.0, 6.0, 9.0)


def test_functions_are_called_in_turn() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = time_together(works, CPU, rounds=2)
    assert "".join(calls) == "ab" * 5  # three to warm up
    assert set(timings) == {"a", "b"}


def test_what_sleeps_longer_takes_longer() -> None:
    works = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}
    timings = time_together(works, CPU, rounds=5)
    assert timings["short"].median >= 1 and timings["long"].median >= 10
    assert timings["short"].median < timings["long"].median


def test_a_step_is_a_share_of_its_run() -> None:
    timing = time_steps(lambda: time.sleep(0.002), CPU, repeats=3, steps=5)
    assert 2 <= timing.median < 10  # not the 10 ms and more of a run


def test_an_error_is_relative_to_the_reference() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))
