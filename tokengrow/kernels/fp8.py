"""Pattention with its six matrix products in float8, through torchao.

Before each product, each operand is scaled to its largest absolute value and cast: to e4m3 in the
forward pass, and to e5m2 for gradients (Micikevicius et al., arXiv 2209.05433). The row operations
are those of the reference.

Shapes: `D` input dim, `E` output dim, `N` parameter tokens.
"""

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokengrow.kernels.graph_constants import assume_constant
from tokengrow.kernels.reference import apply_activation

if TYPE_CHECKING:
    from torchao.float8.config import Float8LinearConfig

HAS_TORCHAO = find_spec("torchao") is not None
"""Whether torchao is installed; evaluated at import, because the lookup would break a graph."""

# On import, torchao lists the kernels for other GPUs that it could not load. None is used here.
logging.getLogger("torchao").setLevel(logging.ERROR)

FP8_MULTIPLE = 16
"""Number that D, N and E must be multiples of, for float8 tensor cores."""


def pattention_fp8(
    x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float, dtype: torch.dtype
) -> Tensor:
    """Return `f(x Kᵀ) V` with products in float8.

    Args:
        x: [..., D].
        key: [N, D].
        value: [N, E].
        activation: a key of `ACTIVATIONS`.
        tau: scale after the norm.
        dtype: dtype of the inputs and outputs of the products; must be bfloat16.

    Returns:
        [..., E] in this dtype.

    Raises:
        ValueError: float8 is not supported, for the reason that `fp8_unsupported_reason` returns.
    """
    if reason := fp8_unsupported_reason(dtype, *key.shape, value.shape[1]):
        raise ValueError(f"kernel=fp8 {reason}")
    scores = _fp8_matmul(x.to(dtype), key.to(dtype).T)
    return _fp8_matmul(apply_activation(scores, activation, tau), value.to(dtype))


def fp8_unsupported_reason(dtype: torch.dtype, *sizes: int) -> str | None:
    """Return why products of this dtype and these sizes cannot be in float8, or None if they can.

    The reason is the end of a sentence that begins with `kernel=fp8`.
    """
    if not HAS_TORCHAO:
        return "needs torchao. Run pip install 'tokengrow[fp8]'."
    if dtype != torch.bfloat16:
        return f"needs bfloat16, got {dtype}. Set fabric.precision=bf16-mixed."
    if invalid := [size for size in sizes if size % FP8_MULTIPLE]:
        return (
            f"needs widths and parameter tokens that are multiples of {FP8_MULTIPLE}, "
            f"got {invalid[0]}."
        )
    return None


def _fp8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return the product, which has both of its gradients computed in float8 too.

    On a CPU, operands are cast to float8 and multiplied in float32, because PyTorch's float8
    product is a hundred times slower there.
    """
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    emulate = not left.is_cuda
    # Fast accumulation keeps fewer bits: acceptable in the forward product, not in gradients.
    forward = ScaledMMConfig(emulate=emulate, use_fast_accum=True)
    backward = ScaledMMConfig(emulate=emulate)
    mm_config = LinearMMConfig(forward, backward, backward)
    config = _float8_config(emulate)
    out: Tensor = matmul_with_hp_or_float8_args.apply(left, right, mm_config, config)
    return out


@assume_constant
def _float8_config(emulate: bool) -> "Float8LinearConfig":
    """Return torchao's settings: each operand is scaled by its largest absolute value."""
    from torchao.float8.config import Float8LinearConfig

    return Float8LinearConfig(emulate=emulate)
