"""Pattention layer: a learned projection whose size is a number of parameter tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengrow.kernels.dispatch import Kernel, grouped_pattention, pattention, uses_triton
from tokengrow.kernels.fp8 import fp8_unsupported_reason
from tokengrow.kernels.reference import ACTIVATIONS, MIN_NORM, Operands
from tokengrow.model.config import ROLES, ModelConfig


class Pattention(nn.Module):
    """Projection `out = f(x Kᵀ) V` (TokenFormer, arXiv 2410.23168, equation 4).

    Args:
        tokens: N parameter tokens.
        d_in: channels of the input, D_in.
        d_out: channels of the output, D_out.
        activation: name of f.
        tau: scale after the L2 norm.
    """

    def __init__(self, tokens: int, d_in: int, d_out: int, activation: str, tau: float) -> None:
        super().__init__()
        self.key_param_tokens = nn.Parameter(torch.empty(tokens, d_in))
        self.value_param_tokens = nn.Parameter(torch.empty(tokens, d_out))
        self.activation = activation
        self.tau = tau
        self.kernel: Kernel = "auto"

    @property
    def operands(self) -> Operands:
        """Key [N, D_in] and value [N, D_out] parameter tokens, and tau: arguments of kernels."""
        return self.key_param_tokens, self.value_param_tokens, self.tau

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection [..., D_out] of [..., D_in]."""
        return pattention(
            x,
            self.key_param_tokens,
            self.value_param_tokens,
            self.activation,
            self.tau,
            self.kernel,
        )

    def scores_weights_and_shares(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, weights and shares of each parameter token at each position.

        Args:
            x: [..., D_in].

        Returns:
            [..., N] each: the score of each token; its weight after the activation; and its share
            in the sum that the activation divides by. That sum adds squares of the scores in
            `l2_norm_gelu`, squares of the output of GELU in `gelu_l2_norm`, and exponentials in
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
        """Return the sizes of the layer, for `print(model)`."""
        (n, d_in), d_out = self.key_param_tokens.shape, self.value_param_tokens.shape[1]
        return f"tokens={n}, d_in={d_in}, d_out={d_out}, {self.activation}, tau={self.tau:.4g}"


def kernel_unsupported_reason(kernel: str, config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return why a kernel cannot compute a model of these sizes, or None if it can.

    Args:
        kernel: a name in `KERNELS`.
        config: config of the model.
        dtype: dtype of its matrix products.

    Returns:
        The end of a sentence that begins with the kernel.
    """
    if kernel != "fp8":
        return None
    sizes = {size for role in ROLES for size in config.role_shape(role)}
    return fp8_unsupported_reason(dtype, *sorted(sizes))


def apply_layers(x: Tensor, layers: Sequence[Pattention]) -> list[Tensor]:
    """Return the outputs of layers that read the same input.

    The Triton kernels process layers of the same shape together. If a layer has hooks, each layer
    is called separately, so that the hooks run.

    Args:
        x: [..., D_in].
        layers: layers of the same activation and kernel.

    Returns:
        [..., D_out] of each layer.
    """
    first = layers[0]
    if not uses_triton(x, first.kernel) or any(map(_has_hooks, layers)):
        return [layer(x) for layer in layers]
    operands = [layer.operands for layer in layers]
    return grouped_pattention(x, operands, first.activation, first.kernel)


def _has_hooks(layer: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on a module."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks
    return any(hooks) or bool(layer._backward_pre_hooks)
