"""Triton kernel for the cross-entropy of rows of logits, which their gradient overwrites.

Shapes: `M` rows, `V` vocabulary. Names as in `triton_rows`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokengrow.kernels.triton_rows import LOG2_E

LOG_2 = tl.constexpr(0.6931471805599453)
BLOCK, WARPS = 8192, 16


@triton.jit
def cross_entropy_kernel(logits, targets, losses, V, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the loss of a row, and overwrite its logits with `softmax - onehot`."""
    i = tl.program_id(0).to(tl.int64)
    p_row = logits + i * V
    target = tl.load(targets + i)
    at_target = tl.load(p_row + target).to(tl.float32)
    o = tl.arange(0, BLOCK)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):  # online softmax in each lane
        b_l = tl.load(p_row + start + o, start + o < V, float("-inf")).to(tl.float32)
        b_new_max = tl.maximum(b_max, b_l)
        b_finite = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp2((b_max - b_finite) * LOG2_E) + tl.exp2((b_l - b_finite) * LOG2_E)
        b_max = b_new_max
    row_max = tl.max(b_max, 0)
    row_sum = tl.sum(b_sum * tl.exp2((b_max - row_max) * LOG2_E), 0)
    tl.store(losses + i, row_max - at_target + tl.log2(row_sum) * LOG_2)
    if NEEDS_GRAD:
        scale = 1.0 / row_sum
        for start in range(0, V, BLOCK):
            m = start + o < V
            b_l = tl.load(p_row + start + o, m, float("-inf")).to(tl.float32)
            b_grad = tl.exp2((b_l - row_max) * LOG2_E) * scale
            b_grad = tl.where(start + o == target, b_grad - 1.0, b_grad)
            tl.store(p_row + start + o, b_grad.to(logits.dtype.element_ty), m)


def cross_entropy_rows(logits: Tensor, targets: Tensor, losses: Tensor, needs_grad: bool) -> None:
    """Write the losses of rows, and the gradient of their sum.

    Args:
        logits: [M, V], contiguous. With `needs_grad` the gradient overwrites them. It is not
            scaled, because the mean over many rows would make it too small for float16.
        targets: [M] int64 in [0, V).
        losses: [M] float32, overwritten.
        needs_grad: whether to compute the gradient; otherwise the logits are unchanged.
    """
    assert logits.is_contiguous() and losses.dtype == torch.float32
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        cross_entropy_kernel[(rows,)](
            logits, targets, losses, vocabulary, needs_grad, BLOCK, num_warps=WARPS
        )
