"""Pattention in plain PyTorch: the oracle for every other kernel, and the CPU path.

Shapes: `D` input dim, `E` output dim, `N` parameter tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# A row of scores whose norm is below this is divided by it instead. A clamp rather than an additive
# epsilon: it leaves every ordinary row exactly scale-invariant, which growth by width relies on,
# and a zero row gives zeros where the published formula gives NaN.
MIN_NORM = 1e-12


def pattention_naive(x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float) -> Tensor:
    """`f(x Kᵀ) V`, with norms and sums in at least float32.

    Args:
        x: [..., D].
        key: [N, D] key parameter tokens.
        value: [N, E] value parameter tokens.
        activation: a key of `ACTIVATIONS`.
        tau: the scale after the norm; sqrt(N) at birth.

    Returns:
        [..., E].
    """
    weights = weigh(F.linear(x, key), activation, tau)
    return F.linear(weights, value.T)


def weigh(scores: Tensor, activation: str, tau: float) -> Tensor:
    """Scores [..., N] to weights [..., N] of their dtype, computed in at least float32."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return ACTIVATIONS[activation](wide, tau).to(scores.dtype)


def _scale_to(rows: Tensor, norm: float) -> Tensor:
    """Gives every row [..., N] this L2 norm; a zero row stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * torch.where(norms > MIN_NORM, norm / norms.clamp_min(MIN_NORM), 0.0)


def _l2_norm_gelu(scores: Tensor, tau: float) -> Tensor:
    return F.gelu(_scale_to(scores, tau))


def _gelu_l2_norm(scores: Tensor, tau: float) -> Tensor:
    return _scale_to(F.gelu(scores), tau)


def _softmax(scores: Tensor, tau: float) -> Tensor:
    # The published softmax variant multiplies by N, which is tau squared at birth.
    return F.softmax(scores, dim=-1) * tau**2


ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l2_norm_gelu": _l2_norm_gelu,
    "gelu_l2_norm": _gelu_l2_norm,
    "softmax": _softmax,
}
"""Scores [..., N] and tau to weights [..., N] (TokenFormer, arXiv 2410.23168, section 3)."""
