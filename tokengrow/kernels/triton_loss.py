"""Cross-entropy of rows of logits, which become their own gradient, as a Triton kernel.

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
def cross_entropy_kernel(logits, targets, losses, V, LEARN: tl.constexpr, BLOCK: tl.constexpr):
    """A row: its loss, and `softmax - onehot` in place of its logits."""
    i = tl.program_id(0).to(tl.int64)
    p_row = logits + i * V
    target = tl.load(targets + i)
    at_target = tl.load(p_row + target).to(tl.float32)
    o = tl.arange(0, BLOCK)
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    b_mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):  # online, in each lane
        b_l = tl.load(p_row + start + o, start + o < V, float("-inf")).to(tl.float32)
        b_higher = tl.maximum(b_top, b_l)
        b_safe = tl.where(b_higher == float("-inf"), 0.0, b_higher)
        b_mass = b_mass * tl.exp2((b_top - b_safe) * LOG2_E) + tl.exp2((b_l - b_safe) * LOG2_E)
        b_top = b_higher
    top = tl.max(b_top, 0)
    mass = tl.sum(b_mass * tl.exp2((b_top - top) * LOG2_E), 0)
    tl.store(losses + i, top - at_target + tl.log2(mass) * LOG_2)
    if LEARN:
        gain = 1.0 / mass
        for start in range(0, V, BLOCK):
            m = start + o < V
            b_l = tl.load(p_row + start + o, m, float("-inf")).to(tl.float32)
            b_grad = tl.exp2((b_l - top) * LOG2_E) * gain
            b_grad = tl.where(start + o == target, b_grad - 1.0, b_grad)
            tl.store(p_row + start + o, b_grad.to(logits.dtype.element_ty), m)


def cross_entropy_rows(logits: Tensor, targets: Tensor, losses: Tensor, learn: bool) -> None:
    """Writes the losses, and the gradients of their sum.

    Args:
        logits: [M, V], contiguous; if there is to be learnt they become their gradient. It is not
            scaled: a mean over many rows would make it too small for float16.
        targets: [M] int64 in [0, V).
        losses: [M] float32, written.
        learn: whether gradients are wanted; else the logits stay as they are.
    """
    assert logits.is_contiguous() and losses.dtype == torch.float32
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        cross_entropy_kernel[(rows,)](
            logits, targets, losses, vocabulary, learn, BLOCK, num_warps=WARPS
        )
