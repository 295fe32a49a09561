"""Cross-entropy of a linear head, without all of its logits at once on a GPU.

Shapes: `M` positions, `D` width, `V` vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.kernels.dispatch import product_dtype
from tokengrow.kernels.fused import product

MAX_LOGITS = 2**30
"""Logits that are held at a time: 2 GB in bfloat16, enough positions to fill a GPU."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden weightᵀ` in nats, computed in at least float32.

    On a GPU the gradients are computed with the loss, piece by piece, and the logits of a piece
    become their own gradient in place. PyTorch's function of this name (from 2.13) keeps more and
    is not in 2.11.

    Args:
        hidden: [M, D].
        weight: [V, D].
        targets: [M] int64 in [0, V).

    Returns:
        A scalar, float32 (float64 for float64).
    """
    dtype = product_dtype(hidden)
    if hidden.is_cuda and dtype != torch.float64 and len(hidden) > 0:
        loss: Tensor = _FusedLoss.apply(hidden.to(dtype), weight, targets, torch.is_grad_enabled())
        return loss
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, targets)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        from tokengrow.kernels.triton_loss import cross_entropy_rows

        head = weight.to(hidden.dtype)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if learn else None
        weight_grad: Tensor | None = None
        for rows in _pieces(len(hidden), len(weight)):
            logits = torch.mm(hidden[rows], head.T)  # [m, V]
            cross_entropy_rows(logits, targets[rows], losses[rows], learn)
            if hidden_grad is not None:
                torch.mm(logits, head, out=hidden_grad[rows])
                weight_grad = _add_product(weight_grad, logits.T, hidden[rows])
        if learn:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        each = grad / len(hidden_grad)
        # In float32: rounded to bfloat16, 1 / 3 is 0.2 % off, and so would be every gradient below.
        return (hidden_grad.float() * each).to(hidden_grad.dtype), weight_grad * each, None, None


def _pieces(positions: int, vocabulary: int) -> list[slice]:
    """Equal runs of positions with at most `MAX_LOGITS` logits each."""
    count = -(-positions // max(1, MAX_LOGITS // vocabulary))
    size = -(-positions // count)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left right, in float32."""
    if total is None:
        return product(left, right, torch.float32)
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return torch.addmm(total, left, right, out_dtype=torch.float32)
