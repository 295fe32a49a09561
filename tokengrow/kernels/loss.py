"""Cross-entropy of a linear head, without storing all of its logits on a GPU.

Shapes: `M` positions, `D` width, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.kernels.dispatch import matmul_dtype
from tokengrow.kernels.fused import matmul

MAX_LOGITS = 2**30
"""Maximum logits in memory: 2 GB in bfloat16, which is enough positions to fill a GPU."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of `hidden weightᵀ` in nats, in at least float32.

    On a GPU the gradients are computed together with the loss, chunk by chunk. The logits of a
    chunk are overwritten by their gradient. PyTorch has a function of this name since 2.13, which
    stores more.

    Args:
        hidden: [M, D].
        weight: [V, D].
        targets: [M] int64 in [0, V).

    Returns:
        A scalar, float32 (float64 for float64).
    """
    dtype = matmul_dtype(hidden)
    if hidden.is_cuda and dtype != torch.float64 and len(hidden) > 0:
        fused_loss: Callable[..., Tensor] = _FusedLoss.apply
        return fused_loss(hidden.to(dtype), weight, targets, torch.is_grad_enabled())
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, targets)


class _FusedLoss(torch.autograd.Function):
    """Cross-entropy that computes its gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool
    ) -> Tensor:
        from tokengrow.kernels.triton_loss import cross_entropy_rows

        head = weight.to(hidden.dtype)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad: Tensor | None = None
        for rows in _chunks(len(hidden), len(weight)):
            logits = torch.mm(hidden[rows], head.T)  # [m, V]
            cross_entropy_rows(logits, targets[rows], losses[rows], needs_grad)
            if hidden_grad is not None:
                torch.mm(logits, head, out=hidden_grad[rows])
                weight_grad = _add_matmul(weight_grad, logits.T, hidden[rows])
        if needs_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        position_grad = grad / len(hidden_grad)
        # In float32, because 1 / 3 rounded to bfloat16 is off by 0.2 %, and all gradients with it.
        wide = hidden_grad.float() * position_grad
        return wide.to(hidden_grad.dtype), weight_grad * position_grad, None, None


def _chunks(positions: int, vocabulary: int) -> list[slice]:
    """Split the positions into equal chunks with at most `MAX_LOGITS` logits each."""
    count = -(-positions // max(1, MAX_LOGITS // vocabulary))
    size = -(-positions // count)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _add_matmul(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left right, in float32."""
    if total is None:
        return matmul(left, right, torch.float32)
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return torch.addmm(total, left, right, out_dtype=torch.float32)
