"""Pattention in plain PyTorch: the oracle for all other kernels, and the CPU path.

Shapes: `D` input dim, `E` output dim, `N` parameter tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
"""Name of the function from scores to weights."""

Operands = tuple[Tensor, Tensor, float]
"""Key [N, D] and value [N, E] parameter tokens, and tau, of one Pattention layer."""

MIN_NORM = 1e-12
"""Smallest L2 norm by which a row of scores is divided.

A row with a smaller norm gives zeros, where the published formula gives NaN. A threshold is used
instead of an additive epsilon, because it leaves every other row exactly scale-invariant. Growth by
width relies on that.
"""


def pattention_reference(
    x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float
) -> Tensor:
    """Return `f(x Kᵀ) V`, with norms and sums in at least float32.

    Args:
        x: [..., D].
        key: [N, D] key parameter tokens.
        value: [N, E] value parameter tokens.
        activation: a key of `ACTIVATIONS`.
        tau: scale after the norm; sqrt(N) at initialisation.

    Returns:
        [..., E].
    """
    weights = apply_activation(F.linear(x, key), activation, tau)
    return F.linear(weights, value.T)


def apply_activation(scores: Tensor, activation: str, tau: float) -> Tensor:
    """Convert scores [..., N] to weights of the same dtype, computed in at least float32."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return ACTIVATIONS[activation](wide, tau).to(scores.dtype)


def _rescale_rows(rows: Tensor, norm: float) -> Tensor:
    """Scale every row [..., N] to this L2 norm; a zero row stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * torch.where(norms > MIN_NORM, norm / norms.clamp_min(MIN_NORM), 0.0)


def _l2_norm_gelu(scores: Tensor, tau: float) -> Tensor:
    return F.gelu(_rescale_rows(scores, tau))


def _gelu_l2_norm(scores: Tensor, tau: float) -> Tensor:
    return _rescale_rows(F.gelu(scores), tau)


def _softmax(scores: Tensor, tau: float) -> Tensor:
    # The published softmax variant multiplies by N, which is tau² at initialisation.
    return F.softmax(scores, dim=-1) * tau**2


ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l2_norm_gelu": _l2_norm_gelu,
    "gelu_l2_norm": _gelu_l2_norm,
    "softmax": _softmax,
}
"""Name to the function from scores [..., N] and tau to weights [..., N] (TokenFormer, arXiv
2410.23168, section 3)."""
