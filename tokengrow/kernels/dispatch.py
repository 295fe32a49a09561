"""The public Pattention operator: checks its arguments and chooses how it is computed.

Shapes: `D` input dim, `E` output dim, `N` parameter tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tokengrow.kernels.fp8 import pattention_fp8
from tokengrow.kernels.fused import DTYPES, MAX_LAYERS, pattention_fused
from tokengrow.kernels.reference import ACTIVATIONS, pattention_naive

KERNELS = ("auto", "naive", "compiled", "triton", "fp8")
"""How Pattention is computed: see `pattention`."""

HAS_TRITON = find_spec("triton") is not None
"""Looked up once, where no compiled graph breaks at it."""

COMPILED_SHAPES = 64
"""That one process compiles the formula for: a ladder has three layers and three batches a size,
and torch stops at 8 by itself."""


def pattention(
    x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float, kernel: str = "auto"
) -> Tensor:
    """Attention between tokens and parameter tokens: `f(x Kᵀ) V`.

    Under autocast the matrix products are in its dtype, whatever the kernel; norms, sums and GELU
    are always in at least float32.

    Args:
        x: [..., D] input tokens.
        key: [N, D] key parameter tokens.
        value: [N, E] value parameter tokens.
        activation: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
        tau: the scale after the L2 norm, sqrt(N) at birth; `softmax` is scaled by tau².
        kernel: naive (plain PyTorch), compiled (the same through torch.compile), triton (cuBLAS
            and row kernels on a GPU), fp8 (naive with products in float8, through torchao), or
            auto: triton for what it can take, else naive.

    Returns:
        [..., E], in the dtype of the matrix products.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation or kernel, or tensors
            that an explicitly chosen kernel cannot take.
    """
    return pattentions(x, [(key, value, tau)], activation, kernel)[0]


def is_fused(x: Tensor, kernel: str) -> bool:
    """Whether `pattention` computes with the Triton kernels for this input."""
    if kernel != "auto":
        return kernel == "triton"
    return x.is_cuda and product_dtype(x) in DTYPES and HAS_TRITON


def pattentions(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, float]],
    activation: str,
    kernel: str = "auto",
) -> list[Tensor]:
    """`pattention` of several layers that read the same input; fused, in fewer products.

    Args:
        x: [..., D].
        layers: key [N, D], value [N, E] and tau of each.
        activation: of all.
        kernel: of all.

    Returns:
        [..., E] of each.

    Raises:
        ValueError: as `pattention`.
    """
    for key, value, _ in layers:
        _check(x, key, value)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: valid are {', '.join(ACTIVATIONS)}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: valid are {', '.join(KERNELS)}")
    if is_fused(x, kernel):
        alike = len({(key.shape, value.shape) for key, value, _ in layers}) == 1
        if alike and len(layers) <= MAX_LAYERS:
            return _fused(x, layers, activation)
        return [_fused(x, [layer], activation)[0] for layer in layers]
    if kernel == "fp8":
        dtype = product_dtype(x)
        return [pattention_fp8(x, key, value, activation, tau, dtype) for key, value, tau in layers]
    # Inside a graph that is being compiled the formula is compiled as a part of it.
    alone = kernel == "compiled" and not torch.compiler.is_compiling()
    function = _compiled() if alone else pattention_naive
    return [function(x, key, value, activation, tau) for key, value, tau in layers]


def _fused(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor, float]], activation: str
) -> list[Tensor]:
    """Layers of one shape together."""
    dtype = product_dtype(x)
    _check_fused(x, dtype)
    keys, values, taus = zip(*layers, strict=True)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    outs, *_ = pattention_fused(rows, list(keys), list(values), activation, list(taus))
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


def product_dtype(x: Tensor) -> torch.dtype:
    """Of matrix products with this tensor, which autocast may narrow."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _check(x: Tensor, key: Tensor, value: Tensor) -> None:
    if key.dim() != 2 or value.dim() != 2 or key.shape[0] != value.shape[0]:
        raise ValueError(
            f"key [N, D] and value [N, E] need the same N: {list(key.shape)}, {list(value.shape)}"
        )
    if x.shape[-1] != key.shape[1]:
        raise ValueError(f"x [..., D] and key [N, D] differ in D: {x.shape[-1]}, {key.shape[1]}")


def _check_fused(x: Tensor, dtype: torch.dtype) -> None:
    if not x.is_cuda and not _interpreted():
        raise ValueError(
            f"kernel triton needs tensors on a GPU, not on {x.device}: take auto or naive "
            "(TRITON_INTERPRET=1, set before the start, runs it on a CPU, for tests)"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"kernel triton takes float32, bfloat16 and float16, not {dtype}: take auto or naive"
        )


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    from tokengrow.kernels.triton_rows import interpreted

    return interpreted()


@cache
def _compiled() -> Callable[..., Tensor]:
    """The formula compiled for fixed shapes, anew for each set of them."""
    code = torch.compile(pattention_naive, fullgraph=True, dynamic=False)

    def run(*arguments: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
            return code(*arguments)

    return run
