"""One layer, forward and backward, in units of the six matrix products that it cannot avoid.

Shapes: `T` tokens, `D` width, `N` parameter tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.bench.rows import Measurement
from tokengrow.bench.timing import peak_memory, relative_error, reset_peak_memory, time_together
from tokengrow.errors import UserError
from tokengrow.kernels.dispatch import Kernel, pattention

CHECKED_TOKENS = 256
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative error of an output or a gradient against float64; tf32 may be on in float32."""

SIX = "six products"

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """The tensors of one case."""

    x: Tensor
    """[T, D]."""
    key: Tensor
    """[N, D]."""
    value: Tensor
    """[N, D]."""
    out_grad: Tensor
    """[T, D]."""

    @classmethod
    def random(cls, tokens: int, d: int, n: int, device: torch.device) -> "Layer":
        """Return random float32 inputs with outputs of unit variance."""
        x, key, value, out_grad = (
            torch.randn(rows, d, device=device) * scale
            for rows, scale in (
                (tokens, 1.0),
                (n, 0.02),
                (n, 1 / math.sqrt(0.425 * n)),
                (tokens, 1.0),
            )
        )
        return cls(x, key, value, out_grad)

    def to(self, dtype: torch.dtype) -> "Layer":
        """Return the layer in another dtype."""
        return Layer(*(each.to(dtype) for each in (self.x, self.key, self.value, self.out_grad)))

    def learn(self, peer: Peer) -> list[Tensor]:
        """Return the output and the gradients of x, key and value."""
        leaves = [each.detach().requires_grad_() for each in (self.x, self.key, self.value)]
        out = peer(*leaves)
        return [out, *torch.autograd.grad(out, leaves, self.out_grad)]


def peers(n: int) -> dict[str, Peer]:
    """Name to function: the published formula eager and compiled, a GELU MLP of this size, ours."""

    def formula(kernel: Kernel) -> Peer:
        return lambda x, key, value: pattention(x, key, value, "l2_norm_gelu", n**0.5, kernel)

    return {
        "formula": formula("reference"),
        "formula-compiled": formula("compiled"),
        "mlp-compiled": _COMPILED_MLP,
        "tokengrow": formula("auto"),
    }


def measure(
    shapes: list[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Measurement]:
    """Measure every peer on every shape (D, N), after the six products.

    Raises:
        UserError: a peer that computes something else; no time of it is given.
    """
    for d, n in shapes:
        yield from _measure_shape(d, n, tokens, dtype, device)


def _measure_shape(
    d: int, n: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Measurement]:
    layer = Layer.random(tokens, d, n, device).to(dtype)
    scores = torch.randn(tokens, n, device=device).to(dtype)
    works: dict[str, Callable[[], object]] = {SIX: partial(_six_products, layer, scores)}
    errors, peaks = {SIX: 0.0}, {SIX: 0.0}
    for name, peer in peers(n).items():
        works[name] = partial(layer.learn, peer)
        errors[name] = 0.0 if peer is _COMPILED_MLP else _error(peer, d, n, dtype, device)
        peaks[name] = _peak_memory(works[name], device)
    timings = time_together(works, device)
    for name, timing in timings.items():
        yield Measurement.on(
            device,
            timing,
            suite="pattention",
            case=f"D {d}, N {n}, {tokens} tokens",
            dtype=str(dtype).removeprefix("torch."),
            peer=name,
            against_limit=round(timing.median / timings[SIX].median, 3),
            peak_gb=round(peaks[name], 3),
            error=float(f"{errors[name]:.1e}"),
        )


def _peak_memory(work: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory that a call allocates, GB."""
    work()  # compiles
    before = torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    reset_peak_memory(device)
    work()
    return peak_memory(device) - before


def _mlp(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.gelu(x @ key.T) @ value


_COMPILED_MLP = torch.compile(_mlp, dynamic=False)


def _six_products(layer: Layer, scores: Tensor) -> None:
    """Those of the forward and the backward pass, in the layouts that they have there."""
    x, key, value, out_grad = layer.x, layer.key, layer.value, layer.out_grad
    for left, right in (
        (x, key.T),
        (scores, value),
        (out_grad, value.T),
        (scores, key),
        (scores.T, x),
        (scores.T, out_grad),
    ):
        torch.mm(left, right)


def _error(peer: Peer, d: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error against float64 on fresh inputs."""
    layer = Layer.random(CHECKED_TOKENS, d, n, device).to(dtype)
    exact = layer.to(torch.float64).learn(peers(n)["formula"])
    errors = [relative_error(*pair) for pair in zip(layer.learn(peer), exact, strict=True)]
    largest = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    if not largest <= TOLERANCE[dtype]:
        raise UserError(f"D {d}, N {n}: a relative error of {largest:.1e}: no time is given for it")
    return largest
