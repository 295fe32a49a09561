"""Pattention whose six matrix products are in float8, through torchao.

Each operand is scaled to its largest absolute value and cast when it enters a product: e4m3
forward, e5m2 for gradients (Micikevicius et al., arXiv 2209.05433). Rows are computed as in the
plain formula.

Shapes: `D` input dim, `E` output dim, `N` parameter tokens.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tokengrow.kernels.reference import weigh

HAS_TORCHAO = find_spec("torchao") is not None
"""Looked up once, where no compiled graph breaks at it."""

# On import it lists the kernels for other GPUs that it could not load, of which none is used here.
logging.getLogger("torchao").setLevel(logging.ERROR)

MULTIPLE = 16
"""What D, N and E have to be multiples of, as tensor cores take float8."""


def pattention_fp8(
    x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float, dtype: torch.dtype
) -> Tensor:
    """`f(x Kᵀ) V`.

    Args:
        x: [..., D].
        key: [N, D].
        value: [N, E].
        activation: a key of `ACTIVATIONS`.
        tau: the scale after the norm.
        dtype: of what enters and leaves the products: bfloat16.

    Returns:
        [..., E] in this dtype.

    Raises:
        ValueError: what `refusal` says.
    """
    if problem := refusal(dtype, *key.shape, value.shape[1]):
        raise ValueError(f"kernel fp8 {problem}")
    scores = _product(x.to(dtype), key.to(dtype).T)
    return _product(weigh(scores, activation, tau), value.to(dtype))


def refusal(dtype: torch.dtype, *sizes: int) -> str | None:
    """Why float8 cannot be had here for products of this dtype and these sizes; None: it can."""
    if not HAS_TORCHAO:
        return "needs torchao: pip install 'tokengrow[fp8]'"
    if dtype != torch.bfloat16:
        return f"takes bfloat16, not {dtype}: set fabric.precision=bf16-mixed"
    if odd := [size for size in sizes if size % MULTIPLE]:
        return f"takes widths and parameter tokens in multiples of {MULTIPLE}, not {odd[0]}"
    return None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right, and both of its gradients, in float8.

    On a CPU the cast is float8's and the product float32's: PyTorch's own float8 product takes a
    CPU a hundred times as long.
    """
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    emulate = not left.is_cuda
    # Sums of the forward product may be kept in fewer bits (fast), those of gradients may not.
    forward = ScaledMMConfig(emulate=emulate, use_fast_accum=True)
    backward = ScaledMMConfig(emulate=emulate)
    mm_config = LinearMMConfig(forward, backward, backward)
    out: Tensor = matmul_with_hp_or_float8_args.apply(left, right, mm_config, _config(emulate))
    return out


@torch.compiler.assume_constant_result
def _config(emulate: bool) -> Any:
    """torchao's settings: each operand scaled by its largest absolute value."""
    from torchao.float8.config import Float8LinearConfig

    return Float8LinearConfig(emulate=emulate)
