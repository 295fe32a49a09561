"""The Pattention layer: a learned projection whose size is a number of parameter tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengrow.kernels.dispatch import KERNELS as KERNELS
from tokengrow.kernels.dispatch import is_fused, pattention, pattentions
from tokengrow.kernels.fp8 import refusal as fp8_refusal
from tokengrow.kernels.reference import ACTIVATIONS, MIN_NORM
from tokengrow.model.config import ROLES, ModelConfig


class Pattention(nn.Module):
    """`out = f(x Kᵀ) V` (TokenFormer, arXiv 2410.23168, equation 4).

    Args:
        tokens: N parameter tokens.
        d_in: channels of the input, D_in.
        d_out: channels of the output, D_out.
        activation: f, by name.
        tau: the scale after the L2 norm.
    """

    def __init__(self, tokens: int, d_in: int, d_out: int, activation: str, tau: float) -> None:
        super().__init__()
        self.key_param_tokens = nn.Parameter(torch.empty(tokens, d_in))
        self.value_param_tokens = nn.Parameter(torch.empty(tokens, d_out))
        self.activation = activation
        self.tau = tau
        self.kernel = "auto"

    @property
    def parts(self) -> tuple[Tensor, Tensor, float]:
        """Key [N, D_in] and value [N, D_out] parameter tokens, and tau: what kernels take."""
        return self.key_param_tokens, self.value_param_tokens, self.tau

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] to [..., D_out]."""
        return pattention(
            x,
            self.key_param_tokens,
            self.value_param_tokens,
            self.activation,
            self.tau,
            self.kernel,
        )

    def scores_weights_and_shares(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each parameter token does at each position, for those who look inside.

        Args:
            x: [..., D_in].

        Returns:
            [..., N] the score of each token, [..., N] its weight after the activation, and [..., N]
            its share in the sum that the activation divides by: squares of the scores in
            `l2_norm_gelu`, squares of what the GELU gives in `gelu_l2_norm`, exponentials in
            `softmax`.
        """
        scores = F.linear(x, self.key_param_tokens)
        weights = ACTIVATIONS[self.activation](scores, self.tau)
        if self.activation == "softmax":
            return scores, weights, weights / self.tau**2
        if self.activation == "gelu_l2_norm":
            return scores, weights, (weights / self.tau).square()
        squares = scores.square()
        norms = squares.sum(-1, keepdim=True).clamp_min(MIN_NORM**2)
        return scores, weights, squares / norms

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        (n, d_in), d_out = self.key_param_tokens.shape, self.value_param_tokens.shape[1]
        return f"tokens={n}, d_in={d_in}, d_out={d_out}, {self.activation}, tau={self.tau:.4g}"


def kernel_unsupported_reason(kernel: str, config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot compute a model of these sizes; None: it can.

    Args:
        kernel: a name in `KERNELS`.
        config: the model's.
        dtype: of its matrix products.
    """
    if kernel != "fp8":
        return None
    sizes = {size for role in ROLES for size in config.role_shape(role)}
    return fp8_refusal(dtype, *sorted(sizes))


def project(x: Tensor, layers: Sequence[Pattention]) -> list[Tensor]:
    """What layers of one activation and kernel make of the same input.

    Fused kernels take layers of one shape together. A layer with a hook is called by itself, so
    that whoever looks inside sees it.

    Args:
        x: [..., D_in].
        layers: that read it.

    Returns:
        [..., D_out] of each.
    """
    first = layers[0]
    if not is_fused(x, first.kernel) or any(map(_has_hooks, layers)):
        return [layer(x) for layer in layers]
    return pattentions(x, [layer.parts for layer in layers], first.activation, first.kernel)


def _has_hooks(layer: nn.Module) -> bool:
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks
    return any(hooks) or bool(layer._backward_pre_hooks)
