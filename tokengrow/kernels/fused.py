"""Pattention for the GPU: six matrix products and two Triton kernels over rows, as one operator.

PyTorch sees a single operator with its own backward pass, `tokengrow::pattention`, so it does not
break a graph of torch.compile. It saves the input, the scores and two numbers per row for the
backward pass, which recomputes the weights.

Layers that read the same input are processed together: one product gives the scores of all of them,
and one gives the gradient of the input. Parameters are passed in the dtype of their storage, which
is float32 under mixed precision. The products return gradients in that dtype, without rounding in
between.

Shapes: `T` tokens, `D` input dim, `E` output dim, `N` parameter tokens, `G` layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("tokengrow::pattention", mutates_args=())
def pattention_fused(
    x: Tensor, keys: list[Tensor], values: list[Tensor], activation: str, taus: list[float]
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Return `f(x Kᵀ) V` of G layers, and the tensors that the backward pass needs.

    Args:
        x: [T, D], in a dtype of `TRITON_DTYPES`, which is the dtype of the products.
        keys: [N, D] of each layer, in a dtype of `TRITON_DTYPES`.
        values: [N, E] of each layer, in a dtype of `TRITON_DTYPES`.
        activation: a key of `ACTIVATIONS`.
        taus: tau of each layer.

    Returns:
        The outputs [T, E] of each layer; the scores [T, G, N]; statistics of rows [2, G, T] in
        float32; and the cast or stacked parameters [G, N, D] and [N, E] of each layer, if the
        products needed copies.
    """
    from tokengrow.kernels.triton_rows import rows_forward

    copies = _empty_copies(x, keys, values)
    if copies:
        torch._foreach_copy_([*copies[0], *copies[1:]], [*keys, *values[: len(copies) - 1]])
    key, cast = _operands(keys, values, copies)
    scores = torch.mm(x, key.flatten(0, 1).T).view(-1, len(keys), key.shape[1])
    weights, stats = rows_forward(scores, activation, taus)  # [G, T, N]
    outs = [torch.mm(w, value) for w, value in zip(weights, cast, strict=True)]
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
    """Return the gradients of x [T, D], of all keys [G, N, D], and of each layer's values [N, E].

    Args:
        out_grads: gradients [T, E] of the output of each layer.
        x: input of the forward pass.
        keys: input of the forward pass.
        values: input of the forward pass.
        copies: copies of parameters that the forward pass returned.
        scores: scores that the forward pass returned.
        stats: statistics of rows that the forward pass returned.
        activation: input of the forward pass.
        taus: input of the forward pass.
    """
    from tokengrow.kernels.triton_rows import rows_backward

    key, cast = _operands(keys, values, copies)
    layers, n, _ = key.shape
    weights_grad = scores.new_empty(layers, len(x), n)
    for out_grad, value, grad in zip(out_grads, cast, weights_grad, strict=True):
        torch.mm(out_grad, value.T, out=grad)
    scores_grad, weights = rows_backward(scores, stats, weights_grad, activation, taus)
    del weights_grad
    triples = zip(weights, out_grads, values, strict=True)
    value_grads = [matmul(w.T, out_grad, value.dtype) for w, out_grad, value in triples]
    flat = scores_grad.view(-1, layers * n)
    key_grad = matmul(flat.T, x, keys[0].dtype).view(key.shape)
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


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, keys, values, ctx.activation, ctx.taus = inputs
    _, scores, stats, copies = output
    ctx.mark_non_differentiable(scores, stats, *copies)
    ctx.set_materialize_grads(False)
    ctx.layers = len(keys)
    ctx.save_for_backward(x, scores, stats, *keys, *values, *copies)


def _backward(ctx: Any, out_grads: list[Tensor | None], *_: None) -> tuple[Any, ...]:
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


pattention_fused.register_autograd(_backward, setup_context=_save_for_backward)


def matmul(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return the product in a dtype, rounded only once on a GPU; sums are always in float32."""
    if left.is_cuda and out_dtype == torch.float32 and left.dtype != out_dtype:
        return torch.mm(left, right, out_dtype=out_dtype)
    return torch.mm(left, right).to(out_dtype)


def _empty_copies(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Allocate copies of the parameters in the dtype of x, keys stacked; none if none is needed."""
    cast = any(parameter.dtype != x.dtype for parameter in (*keys, *values))
    if len(keys) == 1 and not cast:
        return []
    stack = x.new_empty(len(keys), *keys[0].shape)
    return [stack, *(x.new_empty(value.shape) for value in values if cast)]


def _operands(
    keys: Sequence[Tensor], values: Sequence[Tensor], copies: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the keys [G, N, D] and the values [N, E] of each layer, as inputs of the products."""
    if not copies:
        return keys[0].unsqueeze(0), values
    return copies[0], copies[1:] or values
