"""Capture of a function as a CUDA graph."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def capture_cuda_graph(
    function: Callable[[], T],
    device: torch.device,
    warm_ups: int,
    after_warm_up: Callable[[], object] = lambda: None,
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture the kernels that a function launches.

    Args:
        function: function without arguments.
        device: GPU that it runs on.
        warm_ups: calls before the capture, because a capture can neither compile kernels nor
            initialise libraries.
        after_warm_up: function called after each of these calls, for example to restore a state.

    Returns:
        The graph, and the result of the captured call, whose tensors each replay overwrites.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            function()
            after_warm_up()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        result = function()
    return graph, result
