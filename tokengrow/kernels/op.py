"""The public Pattention operator."""

from torch import Tensor

from tokengrow.kernels.naive import ACTIVATIONS, pattention_naive


def pattention(x: Tensor, key: Tensor, value: Tensor, activation: str, tau: float) -> Tensor:
    """Attention between tokens and parameter tokens: `f(x Kᵀ) V`.

    Args:
        x: [..., D] input tokens.
        key: [N, D] key parameter tokens.
        value: [N, E] value parameter tokens.
        activation: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
        tau: the scale after the L2 norm, sqrt(N) at birth; `softmax` is scaled by tau².

    Returns:
        [..., E], in the dtype of the matrix products.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: valid are {', '.join(ACTIVATIONS)}")
    if key.dim() != 2 or value.dim() != 2 or key.shape[0] != value.shape[0]:
        raise ValueError(
            f"key [N, D] and value [N, E] need the same N: {list(key.shape)}, {list(value.shape)}"
        )
    if x.shape[-1] != key.shape[1]:
        raise ValueError(f"x [..., D] and key [N, D] differ in D: {x.shape[-1]}, {key.shape[1]}")
    return pattention_naive(x, key, value, activation, tau)
