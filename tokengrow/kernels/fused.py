"""Pattention as six matrix products and two kernels over rows, for the GPU.

What PyTorch sees is one operator with a backward of its own, `tokengrow::pattention`, so a graph
that torch.compile makes does not break at it. It keeps the input, the scores and two numbers a row
for the backward pass; weights are computed again.

Several layers that read the same input go together: one product for the scores of all of them,
one for the gradient of the input. Parameters come as they are stored, float32 under mixed
precision, and their gradients leave the products in that dtype, without a rounding in between.

Shapes: `T` tokens, `D` input dim, `E` output dim, `N` parameter tokens, `G` layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""

MAX_LAYERS = 3
"""G: query, key and value."""


@torch.library.custom_op("tokengrow::pattention", mutates_args=())
def pattention_fused(
    x: Tensor, keys: list[Tensor], values: list[Tensor], activation: str, taus: list[float]
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """`f(x Kᵀ) V` of G layers, and what the backward pass needs.

    Args:
        x: [T, D], in a dtype of `DTYPES`: that of the products.
        keys: [N, D] of each layer, in a dtype of `DTYPES`.
        values: [N, E] of each layer, likewise.
        activation: as in `pattention`.
        taus: of each layer.

    Returns:
        [T, E] of each layer; the scores [T, G, N]; [2, G, T] float32; the parameters as the
        products took them, [G, N, D] and [N, E] of each layer, where they are copies.
    """
    from tokengrow.kernels.triton_rows import rows_forward

    copies = _empty_copies(x, keys, values)
    if copies:
        torch._foreach_copy_([*copies[0], *copies[1:]], [*keys, *values[: len(copies) - 1]])
    key, cast = _operands(keys, values, copies)
    scores = torch.mm(x, key.flatten(0, 1).T).view(-1, len(keys), key.shape[1])
    weights, stats = rows_forward(scores, activation, taus)  # [G, T, N]
    outs = [torch.mm(each, value) for each, value in zip(weights, cast, strict=True)]
    return outs, scores, stats, copies


@pattention_fused.register_fake
def _(
    x: Tensor, keys: list[Tensor], values: list[Tensor], activation: str, taus: list[float]
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    tokens, layers = len(x), len(keys)
    return (
        [x.new_empty(tokens, value.shape[1]) for value in values],
        x.new_empty(tokens, layers, len(keys[0])),
        x.new_empty(2, layers, tokens, dtype=torch.float32),
        _empty_copies(x, keys, values),
    )


@torch.library.custom_op("tokengrow::pattention_backward", mutates_args=())
def pattention_fused_backward(
    out_grads: list[Tensor],
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    copies: list[Tensor],
    scores: Tensor,
    stats: Tensor,
    activation: str,
    taus: list[float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of x [T, D], of all keys [G, N, D], and of each layer's values [N, E].

    Args:
        out_grads: [T, E] of each layer.
        x: as the forward pass took it; so are keys, values, activation and taus.
        copies: as it gave them; so are scores and stats.
    """
    from tokengrow.kernels.triton_rows import rows_backward

    key, cast = _operands(keys, values, copies)
    layers, n, _ = key.shape
    weights_grad = scores.new_empty(layers, len(x), n)
    for out_grad, value, each in zip(out_grads, cast, weights_grad, strict=True):
        torch.mm(out_grad, value.T, out=each)
    scores_grad, weights = rows_backward(scores, stats, weights_grad, activation, taus)
    del weights_grad
    triples = zip(weights, out_grads, values, strict=True)
    value_grads = [product(w.T, out_grad, value.dtype) for w, out_grad, value in triples]
    flat = scores_grad.view(-1, layers * n)
    key_grad = product(flat.T, x, keys[0].dtype).view(key.shape)
    return torch.mm(flat, key.flatten(0, 1)), key_grad, value_grads


@pattention_fused_backward.register_fake
def _(
    out_grads: list[Tensor],
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    copies: list[Tensor],
    scores: Tensor,
    stats: Tensor,
    activation: str,
    taus: list[float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    key_grad = keys[0].new_empty(len(keys), *keys[0].shape)
    return x.new_empty(x.shape), key_grad, [value.new_empty(value.shape) for value in values]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, keys, values, ctx.activation, ctx.taus = inputs
    _, scores, stats, copies = output
    ctx.mark_non_differentiable(scores, stats, *copies)
    ctx.set_materialize_grads(False)
    ctx.layers = len(keys)
    ctx.save_for_backward(x, scores, stats, *keys, *values, *copies)


def _differentiate(ctx: Any, out_grads: list[Tensor | None], *_: None) -> tuple[Any, ...]:
    x, scores, stats, *rest = ctx.saved_tensors
    layers = ctx.layers
    keys, values, copies = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
    grads = [
        x.new_zeros(len(x), value.shape[1]) if grad is None else grad.contiguous()
        for grad, value in zip(out_grads, values, strict=True)
    ]
    x_grad, key_grad, value_grads = pattention_fused_backward(
        grads, x, keys, values, copies, scores, stats, ctx.activation, ctx.taus
    )
    return x_grad, list(key_grad.unbind()), value_grads, None, None


pattention_fused.register_autograd(_differentiate, setup_context=_keep)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, rounded to this dtype alone: sums are float32 in any case."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _empty_copies(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Room for the parameters in the dtype of x, keys side by side; none where none is needed."""
    cast = any(each.dtype != x.dtype for each in (*keys, *values))
    if len(keys) == 1 and not cast:
        return []
    stack = x.new_empty(len(keys), *keys[0].shape)
    return [stack, *(x.new_empty(value.shape) for value in values if cast)]


def _operands(
    keys: Sequence[Tensor], values: Sequence[Tensor], copies: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Keys [G, N, D] and each layer's values [N, E], as the products take them."""
    if not copies:
        return keys[0].unsqueeze(0), values
    return copies[0], copies[1:] or values
