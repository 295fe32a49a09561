"""Times of a function on a device, and what the device could do at best."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from statistics import quantiles

import torch
from torch import Tensor

from tokengrow.kernels.cuda_graph import capture_cuda_graph

WARM_UP = 3
"""Calls before any is timed: they allocate, compile and choose."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float

    @classmethod
    def none(cls) -> "Timing":
        """Return the timing of a call that did not fit into memory."""
        return cls(nan, nan, nan)

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        """Build a timing from the milliseconds of several calls."""
        fifths = quantiles(times, n=10, method="inclusive")
        return cls(median=fifths[4], p20=fifths[1], p80=fifths[7])


def time_together(
    functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30
) -> dict[str, Timing]:
    """Time functions, one call of each in turn, so that a changing clock affects all alike.

    On a GPU the calls are captured in CUDA graphs first, so that the time is the device's and not
    that of launching. Use `time_steps` for functions too large to capture together.

    Args:
        functions: name to a function without arguments.
        device: that they work on.
        rounds: timed calls of each.
    """
    if device.type == "cuda":
        functions = {
            name: capture_cuda_graph(function, device, WARM_UP)[0].replay
            for name, function in functions.items()
        }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(WARM_UP + rounds):
        for name, function in functions.items():
            milliseconds = _milliseconds(function, device)
            if turn >= WARM_UP:
                times[name].append(milliseconds)
    return {name: Timing.of(each) for name, each in times.items()}


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call on the device, ms."""
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_steps(
    function: Callable[[], object], device: torch.device, repeats: int, steps: int
) -> Timing:
    """Time a call, in runs of several without a wait between them.

    Args:
        function: without arguments.
        device: that it works on.
        repeats: runs.
        steps: calls in a run.
    """
    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        for _ in range(steps):
            function()
        _wait(device)
        times.append((time.perf_counter() - began) * 1e3 / steps)
    return Timing.of(times)


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a kernel that copies, with a change of sign, read and written together.

    A bare copy in a CUDA graph is left to the copy engine, which is slower than kernels are.
    """
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    time = time_together({"copy": lambda: torch.neg(source, out=target)}, device)["copy"].median
    return 2 * source.nbytes / time * 1e3


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random numbers."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = time_together({"product": lambda: left @ right}, device)["product"]
    return 2 * side**3 / timing.median * 1e3


def relative_error(found: Tensor, reference: Tensor) -> float:
    """‖found - reference‖ / ‖reference‖; NaN stays NaN."""
    found, reference = found.detach().double(), reference.detach().double()
    return float((found - reference).norm() / reference.norm())


def reset_peak_memory(device: torch.device) -> None:
    """Reset the counter that `peak_memory` reads."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Largest gigabytes allocated since `reset_peak_memory`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
