"""Triton kernels for the row operations of Pattention, between its matrix products.

The forward kernel converts scores to weights. The backward kernel reads scores and the gradient of
the weights, and writes the gradient of the scores. It also recomputes the weights, which therefore
need not be saved. Each kernel reads and writes every array once. The formulas are in README.md. One
program reduces a row, so results do not depend on the order of programs.

Shapes: `T` tokens, `N` parameter tokens, `G` layers that read the same input, stacked.
Names: `i_` index of a program, `o_` offsets, `m_` masks, `p_` pointers, `b_` blocks [ROWS, BLOCK].
In products, constants come after tensors, as Triton's interpreter requires.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from tokengrow.kernels.limits import MAX_GROUP

L2_NORM_GELU, GELU_L2_NORM, SOFTMAX = (tl.constexpr(i) for i in range(3))
ACTIVATION_CODES = {"l2_norm_gelu": L2_NORM_GELU, "gelu_l2_norm": GELU_L2_NORM, "softmax": SOFTMAX}

MAX_BLOCK, CHUNK = 8192, 2048
"""Maximum scores of a row that fit in registers, and scores per read of a longer row."""

MIN_NORM = tl.constexpr(1e-12)  # tokengrow.kernels.reference.MIN_NORM
MIN_DIVISOR = tl.constexpr(1e-30)  # maxima below this are not divided by
LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the standard normal at 0: 1 / sqrt(2 pi)

# log2(Phi(u) / Phi(-u)) / u as a polynomial in u², fitted over |u| <= 6 to minimise the largest
# error of u Phi(u): 7.4e-5, and 0.6 % of Phi(u) itself down to u = -6. It increases without bound,
# so Phi tends to 0 and 1 outside that range. test_triton_rows.py checks both figures.
P0 = tl.constexpr(2.29962100)
P1 = tl.constexpr(1.08352239e-1)
P2 = tl.constexpr(-1.33096184e-3)
P3 = tl.constexpr(1.09514525e-5)


@triton.jit
def normal_cdf(b_u, EXACT: tl.constexpr):
    """Return Phi(u): exact, or by a polynomial with a quarter of the instructions."""
    if EXACT:
        return tl.math.erf(b_u * SQRT_HALF) * 0.5 + 0.5
    b_y = b_u * b_u
    b_odds = tl.exp2(-b_u * (((b_y * P3 + P2) * b_y + P1) * b_y + P0))
    return 1.0 / (1.0 + b_odds)


@triton.jit
def _gelu_derivative(b_u, b_cdf):
    """Return the derivative of u Phi(u)."""
    return b_cdf + b_u * tl.exp2(-b_u * b_u * HALF_LOG2_E) * DENSITY_AT_0


@triton.jit
def _update_stats(b_v, m_columns, row_max, row_sum, ACTIVATION: tl.constexpr):
    """Update the statistics of rows by one more block of them.

    `row_max` and `row_sum` [ROWS] are, for softmax, the maximum m and the sum of exp(v - m).
    Otherwise they are the largest absolute value m and the sum of (v / m)², so no square overflows.
    """
    if ACTIVATION == SOFTMAX:
        b_v = tl.where(m_columns, b_v, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(b_v, 1))
        row_sum *= tl.exp2((row_max - new_max) * LOG2_E)
        row_sum += tl.sum(tl.exp2((b_v - new_max[:, None]) * LOG2_E), 1)
    else:
        new_max = tl.maximum(row_max, tl.max(tl.abs(b_v), 1))
        inverse = 1.0 / tl.where(new_max > MIN_DIVISOR, new_max, 1.0)
        b_v *= inverse[:, None]
        row_sum = row_sum * (row_max * inverse) * (row_max * inverse) + tl.sum(b_v * b_v, 1)
    return new_max, row_sum


@triton.jit
def _row_scale(row_max, row_sum, tau, ACTIVATION: tl.constexpr):
    """Return the factor [ROWS] of each exponential, score or GELU."""
    if ACTIVATION == SOFTMAX:
        return tau * tau / row_sum
    safe_sum = tl.where(row_sum > 0, row_sum, 1.0)
    nonzero = (row_max * tl.sqrt(row_sum) > MIN_NORM) & (row_sum > 0)
    return tl.where(nonzero, tau / tl.sqrt(safe_sum) / tl.where(nonzero, row_max, 1.0), 0.0)


@triton.jit
def _weights_block(b_s, row_max, scale, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return the weights of a block of scores."""
    if ACTIVATION == SOFTMAX:
        return scale[:, None] * tl.exp2((b_s - row_max[:, None]) * LOG2_E)
    if ACTIVATION == GELU_L2_NORM:
        return b_s * normal_cdf(b_s, EXACT) * scale[:, None]
    b_u = b_s * scale[:, None]
    return b_u * normal_cdf(b_u, EXACT)


@triton.jit
def _gradient_terms(b_s, b_dw, row_max, scale, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return weights w, and h, r, v, c of a block, where ds is `c (h - v sum(h r) / tau²)`."""
    if ACTIVATION == SOFTMAX:
        b_w = scale[:, None] * tl.exp2((b_s - row_max[:, None]) * LOG2_E)
        return b_w, b_dw, b_w, tl.full(b_w.shape, 1.0, tl.float32), b_w
    if ACTIVATION == GELU_L2_NORM:
        b_cdf = normal_cdf(b_s, EXACT)
        b_w = b_s * b_cdf * scale[:, None]
        return b_w, b_dw, b_w, b_w, scale[:, None] * _gelu_derivative(b_s, b_cdf)
    b_u = b_s * scale[:, None]
    b_cdf = normal_cdf(b_u, EXACT)
    b_factor = scale[:, None] + tl.zeros_like(b_u)
    return b_u * b_cdf, b_dw * _gelu_derivative(b_u, b_cdf), b_u, b_u, b_factor


@triton.jit
def _program_rows(T, G: tl.constexpr, tau0, tau1, tau2, ROWS: tl.constexpr):
    """Return the rows [ROWS] int64 of this program, the mask of existing ones, its layer and tau.

    The last rows are processed first. The matrix product before this kernel wrote them last, so
    they are in the cache. The product after it reads the first rows first.
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
    """Convert scores [T, G, N] to weights [G, T, N] and stats [2, G, T] float32."""
    o_rows, m_rows, i_g, tau = _program_rows(T, G, tau0, tau1, tau2, ROWS)
    p_s = scores + (o_rows * G + i_g)[:, None] * N  # [ROWS, 1]
    p_w = weights + (i_g * T + o_rows)[:, None] * N
    o_columns = tl.arange(0, BLOCK)[None, :]
    row_max = tl.full([ROWS], float("-inf") if ACTIVATION == SOFTMAX else 0.0, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    if BLOCK >= N:  # the rows fit in registers
        m = m_rows[:, None] & (o_columns < N)
        b_s = tl.load(p_s + o_columns, m, 0.0, eviction_policy="evict_first").to(tl.float32)
        b_v = b_s * normal_cdf(b_s, EXACT) if ACTIVATION == GELU_L2_NORM else b_s
        row_max, row_sum = _update_stats(b_v, o_columns < N, row_max, row_sum, ACTIVATION)
        scale = _row_scale(row_max, row_sum, tau, ACTIVATION)
        b_w = _weights_block(b_s, row_max, scale, ACTIVATION, EXACT)
        tl.store(p_w + o_columns, b_w.to(weights.dtype.element_ty), m)
    else:
        for start in range(0, N, BLOCK):
            m_columns = start + o_columns < N
            m = m_rows[:, None] & m_columns
            b_s = tl.load(p_s + start + o_columns, m, 0.0).to(tl.float32)
            b_v = b_s * normal_cdf(b_s, EXACT) if ACTIVATION == GELU_L2_NORM else b_s
            row_max, row_sum = _update_stats(b_v, m_columns, row_max, row_sum, ACTIVATION)
        scale = _row_scale(row_max, row_sum, tau, ACTIVATION)
        for start in range(0, N, BLOCK):
            m = m_rows[:, None] & (start + o_columns < N)
            b_s = tl.load(p_s + start + o_columns, m, 0.0, eviction_policy="evict_first")
            b_w = _weights_block(b_s.to(tl.float32), row_max, scale, ACTIVATION, EXACT)
            tl.store(p_w + start + o_columns, b_w.to(weights.dtype.element_ty), m)
    p_stats = stats + i_g * T + o_rows
    tl.store(p_stats, row_max, m_rows)
    tl.store(p_stats + G * T, row_sum, m_rows)


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
    """Compute scores_grad [T, G, N] and weights [G, T, N].

    The inputs are scores [T, G, N], stats [2, G, T] and weights_grad [G, T, N].
    """
    o_rows, m_rows, i_g, tau = _program_rows(T, G, tau0, tau1, tau2, ROWS)
    o_columns = tl.arange(0, BLOCK)[None, :]
    o_s = (o_rows * G + i_g)[:, None] * N + o_columns  # [ROWS, BLOCK]
    o_w = (i_g * T + o_rows)[:, None] * N + o_columns
    p_stats = stats + i_g * T + o_rows
    row_max = tl.load(p_stats, m_rows, 1.0)
    row_sum = tl.load(p_stats + G * T, m_rows, 1.0)
    scale = _row_scale(row_max, row_sum, tau, ACTIVATION)
    per_square = 1.0 / (tau * tau)
    out = weights.dtype.element_ty
    if BLOCK >= N:
        m = m_rows[:, None] & (o_columns < N)
        b_s = tl.load(scores + o_s, m, 0.0, eviction_policy="evict_first").to(tl.float32)
        b_dw = tl.load(weights_grad + o_w, m, 0.0, eviction_policy="evict_first").to(tl.float32)
        b_w, b_h, b_r, b_v, b_c = _gradient_terms(b_s, b_dw, row_max, scale, ACTIVATION, EXACT)
        tl.store(weights + o_w, b_w.to(out), m)
        dot = tl.sum(b_h * b_r, 1) * per_square
        b_ds = b_c * (b_h - b_v * dot[:, None])
        tl.store(scores_grad + o_s, b_ds.to(out), m)
    else:
        dot = tl.zeros([ROWS], tl.float32)
        for start in range(0, N, BLOCK):
            m = m_rows[:, None] & (start + o_columns < N)
            b_s = tl.load(scores + o_s + start, m, 0.0).to(tl.float32)
            b_dw = tl.load(weights_grad + o_w + start, m, 0.0).to(tl.float32)
            _, b_h, b_r, _, _ = _gradient_terms(b_s, b_dw, row_max, scale, ACTIVATION, EXACT)
            dot += tl.sum(b_h * b_r, 1) * per_square
        for start in range(0, N, BLOCK):
            m = m_rows[:, None] & (start + o_columns < N)
            b_s = tl.load(scores + o_s + start, m, 0.0).to(tl.float32)
            b_dw = tl.load(weights_grad + o_w + start, m, 0.0).to(tl.float32)
            b_w, b_h, _, b_v, b_c = _gradient_terms(b_s, b_dw, row_max, scale, ACTIVATION, EXACT)
            tl.store(weights + o_w + start, b_w.to(out), m)
            b_ds = b_c * (b_h - b_v * dot[:, None])
            tl.store(scores_grad + o_s + start, b_ds.to(out), m)


def tile_sizes(n: int, min_warps: int) -> tuple[int, int, int]:
    """Return ROWS, BLOCK and warps of a program, for rows of N scores.

    The sizes were chosen by measurement, so nothing is tuned at the first step: see
    docs/results/kernel-log.md. A warp processes 1024 scores. Rows that do not fit in registers are
    read twice, in chunks.
    """
    if n > MAX_BLOCK:
        return 1, CHUNK, 8
    block = triton.next_power_of_2(n)
    rows = max(1, 1024 // block)
    return rows, block, max(min_warps, rows * block // 1024)


def rows_forward(scores: Tensor, activation: str, taus: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Convert scores to weights.

    Args:
        scores: [T, G, N], contiguous; float32, bfloat16 or float16.
        activation: a key of `ACTIVATION_CODES`.
        taus: tau of each of the G layers.

    Returns:
        Weights [G, T, N] in the dtype of the scores, and statistics of rows [2, G, T] float32 for
        `rows_backward`.
    """
    tokens, layers, n = scores.shape
    weights = scores.new_empty(layers, tokens, n)
    stats = scores.new_empty(2, layers, tokens, dtype=torch.float32)
    _launch(rows_forward_kernel, 1, (scores, weights, stats), scores, activation, taus)
    return weights, stats


def rows_backward(
    scores: Tensor, stats: Tensor, weights_grad: Tensor, activation: str, taus: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the scores, and their weights.

    Args:
        scores: input of `rows_forward`.
        stats: output of `rows_forward`.
        weights_grad: [G, T, N], contiguous, in the dtype of the scores.
        activation: input of `rows_forward`.
        taus: input of `rows_forward`.

    Returns:
        Gradient of the scores [T, G, N] and weights [G, T, N].
    """
    scores_grad, weights = torch.empty_like(scores), torch.empty_like(weights_grad)
    arrays = scores, stats, weights_grad, scores_grad, weights
    _launch(rows_backward_kernel, 2, arrays, scores, activation, taus)
    return scores_grad, weights


def is_interpreted() -> bool:
    """Return whether Triton interprets its kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


def _launch(
    kernel: Any,
    min_warps: int,
    arrays: tuple[Tensor, ...],
    scores: Tensor,
    activation: str,
    taus: Sequence[float],
) -> None:
    """Launch a row kernel on contiguous arrays.

    Args:
        kernel: forward or backward kernel.
        min_warps: minimum warps of a program.
        arrays: pointer arguments of the kernel.
        scores: the array of scores, which gives the sizes.
        activation: a key of `ACTIVATION_CODES`.
        taus: tau of each layer.
    """
    tokens, layers, n = scores.shape
    assert len(taus) == layers <= MAX_GROUP
    assert all(array.is_contiguous() for array in arrays)
    if tokens == 0:
        return
    rows, block, warps = tile_sizes(n, min_warps)
    tau0, tau1, tau2 = (*taus, 1.0, 1.0)[:MAX_GROUP]
    with torch.cuda.device_of(scores):  # Triton launches on the current device
        kernel[(triton.cdiv(tokens, rows) * layers,)](
            *arrays,
            tokens,
            tau0,
            tau1,
            tau2,
            N=n,
            G=layers,
            ACTIVATION=ACTIVATION_CODES[activation],
            EXACT=scores.dtype == torch.float32,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
