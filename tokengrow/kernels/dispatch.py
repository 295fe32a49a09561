"""Public Pattention operator: argument checks and selection of the implementation.

Shapes: `D` input dim, `E` output dim, `N` parameter tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from tokengrow.compat import recompile_limit
from tokengrow.errors import UserError
from tokengrow.kernels.fp8 import pattention_fp8
from tokengrow.kernels.fused import pattention_fused
from tokengrow.kernels.graph_constants import assume_constant
from tokengrow.kernels.limits import MAX_GROUP, TRITON_DTYPES
from tokengrow.kernels.reference import ACTIVATIONS, Operands, pattention_reference

Kernel = Literal["auto", "reference", "compiled", "triton", "fp8"]
"""Implementation of Pattention: see `pattention`."""

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
"""Names of the implementations of Pattention."""

RENAMED_KERNELS = {"naive": "reference"}
"""Former name of an implementation to its name."""

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed; evaluated at import, because the lookup would break a graph."""

MAX_COMPILED_SHAPES = 64
"""Maximum sets of shapes for which one process compiles the formula.

A ladder has three layers and three batches per size, and the default limit of torch is 8.
"""


def check_kernel(kernel: str) -> Kernel:
    """Return a kernel name unchanged, or raise `UserError` if it is not in `KERNELS`."""
    for valid in KERNELS:
        if kernel == valid:
            return valid
    message = f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}."
    if kernel in RENAMED_KERNELS:
        message += f" It is called {RENAMED_KERNELS[kernel]!r} now."
    raise UserError(message)


def pattention(
    x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float, kernel: Kernel = "auto"
) -> Tensor:
    """Return the attention between input tokens and parameter tokens, `f(x Kᵀ) V`.

    Under autocast the matrix products use its dtype, with every kernel. Norms, sums and GELU are
    always computed in at least float32.

    Args:
        x: [..., D] input tokens.
        key: [N, D] key parameter tokens.
        value: [N, E] value parameter tokens.
        activation: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
        tau: scale after the L2 norm, sqrt(N) at initialisation; `softmax` is scaled by tau².
        kernel: reference (plain PyTorch), compiled (the same through torch.compile), triton (cuBLAS
            and row kernels on a GPU), fp8 (reference with products in float8, through torchao), or
            auto: triton if it supports the tensors, otherwise reference.

    Returns:
        [..., E], in the dtype of the matrix products.

    Raises:
        ValueError: the shapes do not match, the activation or kernel is unknown, or an explicitly
            chosen kernel does not support the tensors.
    """
    return grouped_pattention(x, [(key, value, tau)], activation, kernel)[0]


def uses_triton(x: Tensor, kernel: Kernel) -> bool:
    """Return whether `pattention` uses the Triton kernels for this input."""
    if kernel != "auto":
        return kernel == "triton"
    return x.is_cuda and matmul_dtype(x) in TRITON_DTYPES and HAS_TRITON


def grouped_pattention(
    x: Tensor, layers: Sequence[Operands], activation: str, kernel: Kernel = "auto"
) -> list[Tensor]:
    """Return `pattention` of several layers that read the same input.

    The Triton kernels process layers of the same shape together, with fewer matrix products.

    Args:
        x: [..., D].
        layers: key [N, D], value [N, E] and tau of each layer.
        activation: activation of all layers.
        kernel: kernel of all layers.

    Returns:
        [..., E] of each layer.

    Raises:
        ValueError: for the reasons given in `pattention`.
    """
    for key, value, _ in layers:
        _check_shapes(x, key, value)
    if activation not in ACTIVATIONS:
        valid = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {valid}, got {activation!r}.")
    check_kernel(kernel)
    if uses_triton(x, kernel):
        same_shape = len({(key.shape, value.shape) for key, value, _ in layers}) == 1
        if same_shape and len(layers) <= MAX_GROUP:
            return _fused(x, layers, activation)
        return [_fused(x, [layer], activation)[0] for layer in layers]
    if kernel == "fp8":
        dtype = matmul_dtype(x)
        return [pattention_fp8(x, key, value, activation, tau, dtype) for key, value, tau in layers]
    # Inside a graph that is being compiled, the formula is compiled as part of that graph.
    standalone = kernel == "compiled" and not torch.compiler.is_compiling()
    function = _compiled_reference() if standalone else pattention_reference
    return [function(x, key, value, activation, tau) for key, value, tau in layers]


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with this tensor, which autocast may narrow."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _check_shapes(x: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `ValueError` unless the shapes of one layer match."""
    if key.dim() != 2 or value.dim() != 2 or key.shape[0] != value.shape[0]:
        raise ValueError(
            "key [N, D] and value [N, E] must have the same N, got "
            f"{list(key.shape)} and {list(value.shape)}."
        )
    if x.shape[-1] != key.shape[1]:
        raise ValueError(
            f"x [..., D] and key [N, D] must have the same D, got {x.shape[-1]} and {key.shape[1]}."
        )


def _fused(x: Tensor, layers: Sequence[Operands], activation: str) -> list[Tensor]:
    """Return the outputs of layers of one shape, computed by the Triton kernels."""
    dtype = matmul_dtype(x)
    if not x.is_cuda and not _is_interpreted():
        raise ValueError(
            f"kernel=triton needs tensors on a GPU, got {x.device}. Set kernel=auto or "
            "kernel=reference. For tests on a CPU, set TRITON_INTERPRET=1 before the process "
            "starts."
        )
    if dtype not in TRITON_DTYPES:
        raise ValueError(
            f"kernel=triton needs float32, bfloat16 or float16, got {dtype}. Set kernel=auto or "
            "kernel=reference."
        )
    keys, values, taus = zip(*layers, strict=True)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    outs, *_ = pattention_fused(rows, list(keys), list(values), activation, list(taus))
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


@assume_constant
def _is_interpreted() -> bool:
    """Return whether Triton interprets its kernels; importing Triton only here."""
    from tokengrow.kernels.triton_rows import is_interpreted

    return is_interpreted()


@cache
def _compiled_reference() -> Callable[[Tensor, Tensor, Tensor, str, float], Tensor]:
    """Return the formula compiled for static shapes, once for each set of them."""
    compiled = torch.compile(pattention_reference, fullgraph=True, dynamic=False)

    def run(x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float) -> Tensor:
        with recompile_limit(MAX_COMPILED_SHAPES):
            return compiled(x, key, value, activation, tau)

    return run
