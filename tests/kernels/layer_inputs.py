"""Random layers for kernel tests, their gradients, and errors relative to float64."""

import math

import torch
from torch import Tensor

from tokengrow.kernels.dispatch import Kernel, grouped_pattention
from tokengrow.kernels.reference import Operands


def random_layers(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, count: int = 1
) -> tuple[Tensor, list[Operands]]:
    """Return x [T, D] and (key [N, D], value [N, E], tau) of layers, exact in the dtype.

    Args:
        shape: T, D, N and E.
        dtype: dtype of all tensors.
        device: device of all tensors.
        count: number of layers.
    """
    t, d, n, e = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator) * scale
        return drawn.to(dtype).to(device).requires_grad_()

    layers = [
        (draw(n, d, 2 * d**-0.5), draw(n, e, n**-0.5), math.sqrt(n) * (1 + 0.5 * index))
        for index in range(count)
    ]
    return draw(t, d, 1.0), layers


def outputs_and_gradients(
    x: Tensor, layers: list[Operands], activation: str, kernel: Kernel
) -> list[Tensor]:
    """Return outputs and gradients of every input, for fixed random gradients of the outputs."""
    inputs = [x, *(tensor for layer in layers for tensor in layer[:2])]
    outs = grouped_pattention(x, layers, activation, kernel)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, inputs, grads)]


def to_float64(x: Tensor, layers: list[Operands]) -> tuple[Tensor, list[Operands]]:
    """Return copies of the input and the layers in float64."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    return copy(x), [(copy(key), copy(value), tau) for key, value, tau in layers]


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Return the distance of each tensor to the expected one, relative to the norm of that."""
    pairs = zip(actual, expected, strict=True)
    return [((a.double() - e).norm() / e.norm()).item() for a, e in pairs]
