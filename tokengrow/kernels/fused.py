"""Pattention as six matrix products and two kernels over rows, for the GPU.

What PyTorch sees is one operator with a backward of its own, `tokengrow::pattention`, so a graph
that torch.compile makes does not break at it. It keeps the input, the scores and two numbers a row
for the backward pass; weights are computed again.

Several layers that read the same input go together: one product for the scores of all of them,
one for the gradient of the input.

Shapes: `T` tokens, `D` input dim, `E` output dim, `N` parameter tokens, `G` layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""


@torch.library.custom_op("tokengrow::pattention", mutates_args=())
def pattention_fused(
    x: Tensor, key: Tensor, value: Tensor, activation: str, taus: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`f(x Kᵀ) V` of G layers, and what the backward pass needs.

    Args:
        x: [T, D], in a dtype of `DTYPES`, as are key and value.
        key: [G, N, D].
        value: [G, N, E].
        activation: as in `pattention`.
        taus: G scales.

    Returns:
        [G, T, E]; the scores [T, G, N]; [2, G, T] float32.
    """
    from tokengrow.kernels.triton_rows import rows_forward

    layers, n, d = key.shape
    scores = torch.mm(x, key.view(layers * n, d).T).view(-1, layers, n)
    weights, stats = rows_forward(scores, activation, taus)
    return _products(weights, value), scores, stats


@pattention_fused.register_fake
def _(
    x: Tensor, key: Tensor, value: Tensor, activation: str, taus: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, (layers, n, _) = x.shape[0], key.shape
    out = x.new_empty(layers, tokens, value.shape[2])
    return (
        out,
        x.new_empty(tokens, layers, n),
        x.new_empty(2, layers, tokens, dtype=torch.float32),
    )


@torch.library.custom_op("tokengrow::pattention_backward", mutates_args=())
def pattention_fused_backward(
    out_grad: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    stats: Tensor,
    activation: str,
    taus: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, D], key [G, N, D] and value [G, N, E]; out_grad is [G, T, E]."""
    from tokengrow.kernels.triton_rows import rows_backward

    layers, n, d = key.shape
    weights_grad = _products(out_grad, value.transpose(1, 2))  # [G, T, N]
    scores_grad, weights = rows_backward(scores, stats, weights_grad, activation, taus)
    del weights_grad
    value_grad = _products(weights.transpose(1, 2), out_grad)
    flat = scores_grad.view(-1, layers * n)
    x_grad = torch.mm(flat, key.view(layers * n, d))
    return x_grad, torch.mm(flat.T, x).view(layers, n, d), value_grad


@pattention_fused_backward.register_fake
def _(
    out_grad: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    stats: Tensor,
    activation: str,
    taus: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, key, value, ctx.activation, ctx.taus = inputs
    _, scores, stats = output
    ctx.mark_non_differentiable(scores, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, key, value, scores, stats)


def _differentiate(ctx: Any, out_grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grads = pattention_fused_backward(
        out_grad.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.taus
    )
    return *grads, None, None


pattention_fused.register_autograd(_differentiate, setup_context=_keep)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """[G, A, B] times [G, B, C]; one layer alone takes cuBLAS's plain path."""
    if len(left) == 1:
        return torch.mm(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right)
