"""What Pattention does to rows of scores, between its matrix products, as Triton kernels.

Forward: scores to weights. Backward: scores and the gradient of the weights to the gradient of the
scores, and the weights once more, which therefore need not be kept. Each reads and writes every
array once. The formulas are in README.md; a row reduction has one program, so results do not
depend on the order of programs.

Shapes: `T` tokens, `N` parameter tokens, `G` layers that read the same input, side by side.
Names: `i_` index of a program, `o_` offsets, `m_` masks, `p_` pointers, `b_` blocks [ROWS, BLOCK].
Constants stand behind tensors in products: Triton's interpreter needs it so.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from tokengrow.kernels.fused import MAX_LAYERS

L2_NORM_GELU, GELU_L2_NORM, SOFTMAX = (tl.constexpr(i) for i in range(3))
CODES = {"l2_norm_gelu": L2_NORM_GELU, "gelu_l2_norm": GELU_L2_NORM, "softmax": SOFTMAX}

LONGEST, PIECE = 8192, 2048
"""Scores of a row that stay in registers, and those taken at once of a longer one."""

MIN_NORM = tl.constexpr(1e-12)  # tokengrow.kernels.reference.MIN_NORM
TINY = tl.constexpr(1e-30)  # below this the reciprocal of a maximum is not taken
LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the standard normal at 0: 1 / sqrt(2 pi)

# log2(Phi(u) / Phi(-u)) / u as a polynomial in u², fitted over |u| <= 6 so that the largest error
# of u Phi(u) is least: 7.4e-5, and 0.6 % of Phi(u) itself down to u = -6. It increases without end,
# so Phi goes to 0 and 1 beyond that. `tests/kernels/test_triton.py` holds both figures.
P0 = tl.constexpr(2.29962100)
P1 = tl.constexpr(1.08352239e-1)
P2 = tl.constexpr(-1.33096184e-3)
P3 = tl.constexpr(1.09514525e-5)


@triton.jit
def normal_cdf(b_u, EXACT: tl.constexpr):
    """Phi(u); a quarter of the instructions where 8 or 11 bits are kept of the result."""
    if EXACT:
        return tl.math.erf(b_u * SQRT_HALF) * 0.5 + 0.5
    b_y = b_u * b_u
    b_odds = tl.exp2(-b_u * (((b_y * P3 + P2) * b_y + P1) * b_y + P0))
    return 1.0 / (1.0 + b_odds)


@triton.jit
def _gelu_slope(b_u, b_cdf):
    """Derivative of u Phi(u)."""
    return b_cdf + b_u * tl.exp2(-b_u * b_u * HALF_LOG2_E) * DENSITY


@triton.jit
def _join(b_v, m_columns, top, mass, ACTIVATION: tl.constexpr):
    """Joins a block of rows to their statistics.

    `top` and `mass` [ROWS]: for softmax the maximum m and sum of exp(v - m); else the largest
    absolute value m and the sum of (v / m)², so that no square overflows.
    """
    if ACTIVATION == SOFTMAX:
        b_v = tl.where(m_columns, b_v, float("-inf"))
        higher = tl.maximum(top, tl.max(b_v, 1))
        mass *= tl.exp2((top - higher) * LOG2_E)
        mass += tl.sum(tl.exp2((b_v - higher[:, None]) * LOG2_E), 1)
    else:
        higher = tl.maximum(top, tl.max(tl.abs(b_v), 1))
        shrink = 1.0 / tl.where(higher > TINY, higher, 1.0)
        b_v *= shrink[:, None]
        mass = mass * (top * shrink) * (top * shrink) + tl.sum(b_v * b_v, 1)
    return higher, mass


@triton.jit
def _gain(top, mass, tau, ACTIVATION: tl.constexpr):
    """[ROWS] what an exponential, a score or a GELU is multiplied by."""
    if ACTIVATION == SOFTMAX:
        return tau * tau / mass
    positive = tl.where(mass > 0, mass, 1.0)
    some = (top * tl.sqrt(mass) > MIN_NORM) & (mass > 0)
    return tl.where(some, tau / tl.sqrt(positive) / tl.where(some, top, 1.0), 0.0)


@triton.jit
def _weigh(b_s, top, gain, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Weights of a block of scores."""
    if ACTIVATION == SOFTMAX:
        return gain[:, None] * tl.exp2((b_s - top[:, None]) * LOG2_E)
    if ACTIVATION == GELU_L2_NORM:
        return b_s * normal_cdf(b_s, EXACT) * gain[:, None]
    b_u = b_s * gain[:, None]
    return b_u * normal_cdf(b_u, EXACT)


@triton.jit
def _differentiate(b_s, b_dw, top, gain, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Weights w, and h, r, v and c of a block: its ds is `c (h - v sum(h r) / tau²)`."""
    if ACTIVATION == SOFTMAX:
        b_w = gain[:, None] * tl.exp2((b_s - top[:, None]) * LOG2_E)
        return b_w, b_dw, b_w, tl.full(b_w.shape, 1.0, tl.float32), b_w
    if ACTIVATION == GELU_L2_NORM:
        b_cdf = normal_cdf(b_s, EXACT)
        b_w = b_s * b_cdf * gain[:, None]
        return b_w, b_dw, b_w, b_w, gain[:, None] * _gelu_slope(b_s, b_cdf)
    b_u = b_s * gain[:, None]
    b_cdf = normal_cdf(b_u, EXACT)
    b_slope = gain[:, None] + tl.zeros_like(b_u)
    return b_u * b_cdf, b_dw * _gelu_slope(b_u, b_cdf), b_u, b_u, b_slope


@triton.jit
def _place(T, G: tl.constexpr, tau0, tau1, tau2, ROWS: tl.constexpr):
    """This program's rows [ROWS] int64, which of them there are, its layer and tau.

    The last rows come first: the product before this kernel wrote them last, so they are in the
    cache, and the one after it reads the first rows first.
    """
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_g = i % G
    o_rows = (i // G).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tau = tl.where(i_g == 0, tau0, tl.where(i_g == 1, tau1, tau2)).to(tl.float32)
    return o_rows, o_rows < T, i_g.to(tl.int64), tau


@triton.jit
def rows_forward_kernel(
    scores,
    weights,
    stats,
    T,
    tau0,
    tau1,
    tau2,
    N: tl.constexpr,
    G: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scores [T, G, N] to weights [G, T, N] and stats [2, G, T] float32."""
    o_rows, m_rows, i_g, tau = _place(T, G, tau0, tau1, tau2, ROWS)
    p_s = scores + (o_rows * G + i_g)[:, None] * N  # [ROWS, 1]
    p_w = weights + (i_g * T + o_rows)[:, None] * N
    o_columns = tl.arange(0, BLOCK)[None, :]
    top = tl.full([ROWS], float("-inf") if ACTIVATION == SOFTMAX else 0.0, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    if BLOCK >= N:  # the rows stay in registers
        m = m_rows[:, None] & (o_columns < N)
        b_s = tl.load(p_s + o_columns, m, 0.0, eviction_policy="evict_first").to(tl.float32)
        b_v = b_s * normal_cdf(b_s, EXACT) if ACTIVATION == GELU_L2_NORM else b_s
        top, mass = _join(b_v, o_columns < N, top, mass, ACTIVATION)
        gain = _gain(top, mass, tau, ACTIVATION)
        b_w = _weigh(b_s, top, gain, ACTIVATION, EXACT)
        tl.store(p_w + o_columns, b_w.to(weights.dtype.element_ty), m)
    else:
        for start in range(0, N, BLOCK):
            m_columns = start + o_columns < N
            m = m_rows[:, None] & m_columns
            b_s = tl.load(p_s + start + o_columns, m, 0.0).to(tl.float32)
            b_v = b_s * normal_cdf(b_s, EXACT) if ACTIVATION == GELU_L2_NORM else b_s
            top, mass = _join(b_v, m_columns, top, mass, ACTIVATION)
        gain = _gain(top, mass, tau, ACTIVATION)
        for start in range(0, N, BLOCK):
            m = m_rows[:, None] & (start + o_columns < N)
            b_s = tl.load(p_s + start + o_columns, m, 0.0, eviction_policy="evict_first")
            b_w = _weigh(b_s.to(tl.float32), top, gain, ACTIVATION, EXACT)
            tl.store(p_w + start + o_columns, b_w.to(weights.dtype.element_ty), m)
    p_stats = stats + i_g * T + o_rows
    tl.store(p_stats, top, m_rows)
    tl.store(p_stats + G * T, mass, m_rows)


@triton.jit
def rows_backward_kernel(
    scores,
    stats,
    weights_grad,
    scores_grad,
    weights,
    T,
    tau0,
    tau1,
    tau2,
    N: tl.constexpr,
    G: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scores [T, G, N], stats [2, G, T], weights_grad [G, T, N] to scores_grad [T, G, N] and
    weights [G, T, N]."""
    o_rows, m_rows, i_g, tau = _place(T, G, tau0, tau1, tau2, ROWS)
    o_columns = tl.arange(0, BLOCK)[None, :]
    o_s = (o_rows * G + i_g)[:, None] * N + o_columns  # [ROWS, BLOCK]
    o_w = (i_g * T + o_rows)[:, None] * N + o_columns
    p_stats = stats + i_g * T + o_rows
    top = tl.load(p_stats, m_rows, 1.0)
    mass = tl.load(p_stats + G * T, m_rows, 1.0)
    gain = _gain(top, mass, tau, ACTIVATION)
    per_square = 1.0 / (tau * tau)
    out = weights.dtype.element_ty
    if BLOCK >= N:
        m = m_rows[:, None] & (o_columns < N)
        b_s = tl.load(scores + o_s, m, 0.0, eviction_policy="evict_first").to(tl.float32)
        b_dw = tl.load(weights_grad + o_w, m, 0.0, eviction_policy="evict_first").to(tl.float32)
        b_w, b_h, b_r, b_v, b_c = _differentiate(b_s, b_dw, top, gain, ACTIVATION, EXACT)
        tl.store(weights + o_w, b_w.to(out), m)
        along = tl.sum(b_h * b_r, 1) * per_square
        b_ds = b_c * (b_h - b_v * along[:, None])
        tl.store(scores_grad + o_s, b_ds.to(out), m)
    else:
        along = tl.zeros([ROWS], tl.float32)
        for start in range(0, N, BLOCK):
            m = m_rows[:, None] & (start + o_columns < N)
            b_s = tl.load(scores + o_s + start, m, 0.0).to(tl.float32)
            b_dw = tl.load(weights_grad + o_w + start, m, 0.0).to(tl.float32)
            _, b_h, b_r, _, _ = _differentiate(b_s, b_dw, top, gain, ACTIVATION, EXACT)
            along += tl.sum(b_h * b_r, 1) * per_square
        for start in range(0, N, BLOCK):
            m = m_rows[:, None] & (start + o_columns < N)
            b_s = tl.load(scores + o_s + start, m, 0.0).to(tl.float32)
            b_dw = tl.load(weights_grad + o_w + start, m, 0.0).to(tl.float32)
            b_w, b_h, _, b_v, b_c = _differentiate(b_s, b_dw, top, gain, ACTIVATION, EXACT)
            tl.store(weights + o_w + start, b_w.to(out), m)
            b_ds = b_c * (b_h - b_v * along[:, None])
            tl.store(scores_grad + o_s + start, b_ds.to(out), m)


def tile(n: int, least_warps: int) -> tuple[int, int, int]:
    """ROWS, BLOCK and warps of a program for rows of N scores.

    Chosen by measurement, so nothing is tuned at the first step: docs/results/kernel-log.md. A warp
    takes 1024 scores; rows that do not fit into registers are read in pieces, twice.
    """
    if n > LONGEST:
        return 1, PIECE, 8
    block = triton.next_power_of_2(n)
    rows = max(1, 1024 // block)
    return rows, block, max(least_warps, rows * block // 1024)


def rows_forward(scores: Tensor, activation: str, taus: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weights of scores.

    Args:
        scores: [T, G, N], contiguous; float32, bfloat16 or float16.
        activation: a key of `CODES`.
        taus: G.

    Returns:
        [G, T, N] weights in the dtype of the scores, and [2, G, T] float32 for `rows_backward`.
    """
    tokens, layers, n = scores.shape
    weights = scores.new_empty(layers, tokens, n)
    stats = scores.new_empty(2, layers, tokens, dtype=torch.float32)
    _launch(rows_forward_kernel, 1, (scores, weights, stats), scores, activation, taus)
    return weights, stats


def rows_backward(
    scores: Tensor, stats: Tensor, weights_grad: Tensor, activation: str, taus: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Gradient of the scores, and their weights.

    Args:
        scores: as `rows_forward` took them.
        stats: as it gave them.
        weights_grad: [G, T, N], contiguous, in the dtype of the scores.
        activation: as there.
        taus: as there.

    Returns:
        [T, G, N] gradient, [G, T, N] weights.
    """
    scores_grad, weights = torch.empty_like(scores), torch.empty_like(weights_grad)
    arrays = scores, stats, weights_grad, scores_grad, weights
    _launch(rows_backward_kernel, 2, arrays, scores, activation, taus)
    return scores_grad, weights


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


def _launch(
    kernel: Any,
    least_warps: int,
    arrays: tuple[Tensor, ...],
    scores: Tensor,
    activation: str,
    taus: Sequence[float],
) -> None:
    tokens, layers, n = scores.shape
    assert len(taus) == layers <= MAX_LAYERS
    assert all(array.is_contiguous() for array in arrays)
    if tokens == 0:
        return
    rows, block, warps = tile(n, least_warps)
    tau0, tau1, tau2 = (*taus, 1.0, 1.0)[:MAX_LAYERS]
    with torch.cuda.device_of(scores):  # Triton launches on the current device
        kernel[(triton.cdiv(tokens, rows) * layers,)](
            *arrays,
            tokens,
            tau0,
            tau1,
            tau2,
            N=n,
            G=layers,
            ACTIVATION=CODES[activation],
            EXACT=scores.dtype == torch.float32,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
