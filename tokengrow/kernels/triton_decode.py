"""One token through a block, as seven Triton kernels that read its weights once.

| kernel | reads | writes |
| --- | --- | --- |
| scores of query, key, value | x + parts of the ffn before, three K | scores, the new x |
| values of query, key, value | scores, three V | parts of q, k, v |
| attention | parts of q, k, v, the cache | the cache's new slot, mixes of pieces of the cache |
| scores, values of output | mixes, K; scores, V | scores; parts |
| scores, values of ffn | x + parts of output, K; scores, V | scores, the new x; parts |

One row is too little work to give every sum to one program, so sums are split and whoever needs
them adds the parts, always in the same order: no atomics, and the same bits every time. What lies
between the weights is float32.

Shapes: `B` rows of a batch, `D` width of an input, `E` width of an output, `N` parameter tokens,
`G` layers that read the same input, `H` heads, `C` head dim, `R` rotated channels, `S` slots of the
cache. Names as in `triton_rows`; i_b a row of the batch, i_g a layer.
"""

import triton
import triton.language as tl

from tokengrow.kernels.triton_rows import (
    GELU_L2_NORM,
    LOG2_E,
    MIN_NORM,
    SOFTMAX,
    normal_cdf,
)


@triton.jit
def _of_three(i_g, a, b, c, G: tl.constexpr):
    """What belongs to layer i_g."""
    if G == 1:
        return a
    return tl.where(i_g == 0, a, tl.where(i_g == 1, b, c))


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Until all kernels in front have ended; the next one may start now, to do the same.

    Before it, nothing is written, and read is what no kernel of the step writes: weights, the
    token's slot, starts of texts, table, slots before the token's. Every program of every kernel
    waits: when one goes on, the kernel in front has ended, and with it whatever that one waited
    for. So what follows here runs as if no two kernels overlapped, and buffers may be used again.
    PyTorch's kernels, in front of the first and behind the last, overlap with none.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _finite(b_top):
    """A maximum that may be subtracted: of nothing at all it is -inf."""
    return tl.where(b_top == float("-inf"), 0.0, b_top)


@triton.jit
def _residual(x, parts, x_next, i_b, first, o, m, D: tl.constexpr, B: tl.constexpr, PARTS):
    """x [B, D] plus its PARTS, which the first program keeps as x_next."""
    b_x = tl.load(x + i_b * D + o, m, 0.0).to(tl.float32)
    for j in tl.static_range(PARTS):
        b_x += tl.load(parts + (i_b + j * B) * D + o, m, 0.0)
    if PARTS > 0:
        tl.store(x_next + i_b * D + o, b_x, m & first)
    return b_x


@triton.jit
def _normed(b_x, m, eps, D: tl.constexpr):
    """Layer norm without affine."""
    b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
    return b_x / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)


@triton.jit
def _span(last, PIECES: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of a piece when the last one in use is `last`."""
    return tl.cdiv(tl.cdiv(last + 1, PIECES), SLOTS) * SLOTS


@triton.jit
def _joined(
    mixes,
    tops,
    last,
    i_b,
    D: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mix of all slots [D] from those of the pieces; GROUP channels lie in one head."""
    span = _span(last, PIECES, SLOTS)
    o = tl.arange(0, BLOCK // GROUP) * GROUP  # a number of a head serves a group of channels
    o_d = o[:, None] + tl.arange(0, GROUP)[None, :]
    b_top = tl.full(o.shape, float("-inf"), tl.float32)
    b_mass = tl.zeros(o.shape, tl.float32)
    b_x = tl.zeros(o_d.shape, tl.float32)
    for j in tl.static_range(PIECES):
        m = (o < D) & (span * j <= last)
        o_head = (i_b + j * B) * (D // C) + o // C
        b_t = tl.load(tops + o_head, m, float("-inf"))
        b_m = tl.load(tops + PIECES * B * (D // C) + o_head, m, 0.0)
        b_o = tl.load(mixes + (i_b + j * B) * D + o_d, m[:, None], 0.0)
        b_higher = tl.maximum(b_top, b_t)
        b_old = tl.exp2((b_top - _finite(b_higher)) * LOG2_E)
        b_new = tl.exp2((b_t - _finite(b_higher)) * LOG2_E)
        b_x = b_x * b_old[:, None] + b_o * b_new[:, None]
        b_mass = b_mass * b_old + b_m * b_new
        b_top = b_higher
    b_x *= (1.0 / tl.where(b_mass > 0, b_mass, 1.0))[:, None]
    return tl.reshape(b_x, [BLOCK])


@triton.jit
def _key_rows(p_k, row, n, o_r, o_d, m_d, D: tl.constexpr):
    """Rows [ROWS, BLOCK] of K from this one on."""
    m = (row + o_r < n)[:, None] & m_d[None, :]
    return tl.load(p_k + row * D + o_r[:, None] * D + o_d[None, :], m, 0.0)


@triton.jit
def scores_kernel(
    x,
    parts,
    x_next,
    mixes,
    tops,
    slot,
    k0,
    k1,
    k2,
    scores,
    stats,
    n0,
    n1,
    n2,
    eps,
    D: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    MIXED: tl.constexpr,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Input to scores [G, B, N], and [2, G, B, P] maxima and sums of each of P programs.

    The input is the norm of x [B, D] + parts [PARTS, B, D], or what attention has MIXED.
    """
    i_b, i, i_g = tl.program_id(0) % B, tl.program_id(0) // B, tl.program_id(1)
    programs = tl.num_programs(0) // B
    n = _of_three(i_g, n0, n1, n2, G)
    p_k = _of_three(i_g, k0, k1, k2, G)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_d = o_d < D
    # The first weights are on their way before anything else is asked for.
    b_k = _key_rows(p_k, i * ROWS, n, o_r, o_d, m_d, D)
    if MIXED:
        last = tl.load(slot).to(tl.int32)
    _wait(OVERLAP)
    if MIXED:
        b_x = _joined(mixes, tops, last, i_b, D, B, C, GROUP, PIECES, SLOTS, BLOCK)
    else:
        first = (i == 0) & (i_g == 0)
        b_x = _residual(x, parts, x_next, i_b, first, o_d, m_d, D, B, PARTS)
        b_x = _normed(b_x, m_d, eps, D)
    b_top = tl.full([ROWS], float("-inf"), tl.float32)
    b_mass = tl.zeros([ROWS], tl.float32)
    for block in range(i, tl.cdiv(n, ROWS), programs):
        b_ahead = _key_rows(p_k, (block + programs) * ROWS, n, o_r, o_d, m_d, D)
        b_s = tl.sum(b_k.to(tl.float32) * b_x[None, :], 1)
        o_n = block * ROWS + o_r
        tl.store(scores + (i_g * B + i_b) * N + o_n, b_s, o_n < n)
        if ACTIVATION == SOFTMAX:
            b_s = tl.where(o_n < n, b_s, float("-inf"))
            b_higher = tl.maximum(b_top, b_s)
            b_mass *= tl.exp2((b_top - _finite(b_higher)) * LOG2_E)
            b_mass += tl.exp2((b_s - _finite(b_higher)) * LOG2_E)
            b_top = b_higher
        elif ACTIVATION == GELU_L2_NORM:
            b_g = b_s * normal_cdf(b_s, EXACT)
            b_mass += b_g * b_g
        else:
            b_mass += b_s * b_s
        b_k = b_ahead
    p_stats = stats + (i_g * B + i_b) * programs + i
    top = tl.max(b_top, 0)
    if ACTIVATION == SOFTMAX:
        tl.store(p_stats, top)
        b_mass *= tl.exp2((b_top - _finite(top)) * LOG2_E)
    tl.store(p_stats + programs * G * B, tl.sum(b_mass, 0))


@triton.jit
def _gain(p_stats, tau, P: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION, BLOCK: tl.constexpr):
    """The maximum of all scores, and what an exponential, a GELU or a score is multiplied by."""
    o = tl.arange(0, BLOCK)
    b_mass = tl.load(p_stats + STRIDE + o, o < P, 0.0)
    top = 0.0
    if ACTIVATION == SOFTMAX:
        b_top = tl.load(p_stats + o, o < P, float("-inf"))
        top = tl.max(b_top, 0)
        return top, tau * tau / tl.sum(b_mass * tl.exp2((b_top - top) * LOG2_E), 0)
    norm = tl.sqrt(tl.sum(b_mass, 0))
    return top, tl.where(norm > MIN_NORM, tau / tl.where(norm > MIN_NORM, norm, 1.0), 0.0)


@triton.jit
def _value_rows(p_v, row, n, o_r, o_e, E: tl.constexpr):
    """Columns o_e of rows [ROWS, WIDE] of V from this one on."""
    m = (row + o_r < n)[:, None] & (o_e < E)[None, :]
    return tl.load(p_v + row * E + o_r[:, None] * E + o_e[None, :], m, 0.0)


@triton.jit
def values_kernel(
    scores,
    stats,
    v0,
    v1,
    v2,
    parts,
    n0,
    n1,
    n2,
    tau0,
    tau1,
    tau2,
    E: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    P_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Scores [G, B, N] and their stats [2, G, B, P] to parts [G, PARTS, B, E] of weights times V.

    A part has every PARTS-th tile of the layer's rows.
    """
    i_b, i_e = tl.program_id(0) % B, tl.program_id(0) // B
    i_part, i_g = tl.program_id(1), tl.program_id(2)
    n = _of_three(i_g, n0, n1, n2, G)
    p_v = _of_three(i_g, v0, v1, v2, G)
    o_r, o_e = tl.arange(0, ROWS), i_e * WIDE + tl.arange(0, WIDE)
    b_v = _value_rows(p_v, i_part * ROWS, n, o_r, o_e, E)
    b_ahead = _value_rows(p_v, (i_part + PARTS) * ROWS, n, o_r, o_e, E)
    _wait(OVERLAP)
    tau = _of_three(i_g, tau0, tau1, tau2, G)
    top, gain = _gain(stats + (i_g * B + i_b) * P, tau, P, G * B * P, ACTIVATION, P_BLOCK)
    b_sum = tl.zeros([ROWS, WIDE], tl.float32)
    for row in range(i_part * ROWS, n, PARTS * ROWS):
        m_r = row + o_r < n
        b_s = tl.load(scores + (i_g * B + i_b) * N + row + o_r, m_r, 0.0)
        if ACTIVATION == SOFTMAX:
            b_w = tl.exp2((tl.where(m_r, b_s, top) - top) * LOG2_E) * gain
        elif ACTIVATION == GELU_L2_NORM:
            b_w = b_s * normal_cdf(b_s, EXACT) * gain
        else:
            b_u = b_s * gain
            b_w = b_u * normal_cdf(b_u, EXACT)
        b_sum += b_w[:, None] * b_v.to(tl.float32)
        b_v = b_ahead
        b_ahead = _value_rows(p_v, row + PARTS * ROWS * 2, n, o_r, o_e, E)
    p_part = parts + ((i_g * PARTS + i_part) * B + i_b) * E
    tl.store(p_part + o_e, tl.sum(b_sum, 0), o_e < E)


@triton.jit
def _slots(p, o_s, end, o_c, m_c, C: tl.constexpr):
    """Slots [SLOTS, BLOCK] of a head's cache, those before `end`."""
    return tl.load(p + o_s[:, None] * C + o_c[None, :], (o_s < end)[:, None] & m_c[None, :], 0.0)


@triton.jit
def _head(p_parts, o, m, STRIDE: tl.constexpr, PARTS: tl.constexpr):
    """Channels o of a head from their parts."""
    b = tl.zeros(o.shape, tl.float32)
    for j in tl.static_range(PARTS):
        b += tl.load(p_parts + o + j * STRIDE, m, 0.0)
    return b


@triton.jit
def _rotated(p_parts, p_cos, p_sin, o, m, R: tl.constexpr, STRIDE: tl.constexpr, PARTS):
    """The same, its first R channels rotated: half-split, as in tokengrow.model.rotary."""
    b = _head(p_parts, o, m, STRIDE, PARTS)
    if R > 0:
        m_r, m_low = o < R, o < R // 2
        b_other = _head(p_parts, tl.where(m_low, o + R // 2, o - R // 2), m_r, STRIDE, PARTS)
        b_other = tl.where(m_low, -b_other, b_other)
        b = b * tl.load(p_cos + o, m_r, 1.0) + b_other * tl.load(p_sin + o, m_r, 0.0)
    return b


@triton.jit
def attention_kernel(
    parts,
    cos,
    sin,
    slot,
    starts,
    keys,
    values,
    mixes,
    tops,
    scale,
    S,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Parts [3, PARTS, B, H * C] of q, k and v to a mix of each piece of the cache.

    The token's own key and value go into its slot of keys and values [B, H, S, C]. Slots behind it
    are not read, nor are pieces that have none before it. If PADDED, those before the text's own of
    starts [B] have no weight. mixes [PIECES, B, H * C] are sums of exp(score - top) value; tops
    [2, PIECES, B, H] hold the top, -inf where no slot has weight, and the sum of the factors.
    """
    i, i_piece = tl.program_id(0), tl.program_id(1)  # i = i_b * H + i_h
    last = tl.load(slot).to(tl.int32)
    first = 0
    if PADDED:
        first = tl.load(starts + i // H).to(tl.int32)
    span = _span(last, PIECES, SLOTS)
    start = i_piece * span
    end = tl.minimum(start + span, last)  # of what is in the cache already
    o_c, o_s = tl.arange(0, BLOCK), start + tl.arange(0, SLOTS)
    m_c = o_c < C
    p_keys, p_values = keys + i.to(tl.int64) * S * C, values + i.to(tl.int64) * S * C
    b_keys = _slots(p_keys, o_s, end, o_c, m_c, C)
    b_values = _slots(p_values, o_s, end, o_c, m_c, C)
    _wait(OVERLAP)
    if start <= last:
        p_q = parts + i * C
        p_cos, p_sin = cos + (last - first) * R, sin + (last - first) * R
        kind = keys.dtype.element_ty
        b_q = _rotated(p_q, p_cos, p_sin, o_c, m_c, R, B * H * C, PARTS) * scale
        p_q += PARTS * B * H * C
        b_k = _rotated(p_q, p_cos, p_sin, o_c, m_c, R, B * H * C, PARTS).to(kind)
        p_q += PARTS * B * H * C
        b_v = _head(p_q, o_c, m_c, B * H * C, PARTS).to(kind)
        if last < start + span:
            tl.store(p_keys + last * C + o_c, b_k, m_c)
            tl.store(p_values + last * C + o_c, b_v, m_c)
        top, mass = float("-inf"), 0.0
        b_mix = tl.zeros([BLOCK], tl.float32)
        for _ in range(start, tl.minimum(start + span, last + 1), SLOTS):
            m_own = (o_s == last)[:, None]
            b_s = tl.sum(tl.where(m_own, b_k[None, :], b_keys).to(tl.float32) * b_q[None, :], 1)
            b_s = tl.where(o_s <= last, b_s, float("-inf"))
            if PADDED:
                b_s = tl.where(o_s >= first, b_s, float("-inf"))
            higher = tl.maximum(top, tl.max(b_s, 0))
            finite = _finite(higher) if PADDED else higher
            b_w = tl.exp2((b_s - finite) * LOG2_E)
            shrink = tl.exp2((top - finite) * LOG2_E)
            b_all = tl.where(m_own, b_v[None, :], b_values).to(tl.float32)
            b_mix = b_mix * shrink + tl.sum(b_all * b_w[:, None], 0)
            mass = mass * shrink + tl.sum(b_w, 0)
            top = higher
            o_s += SLOTS
            b_keys = _slots(p_keys, o_s, end, o_c, m_c, C)
            b_values = _slots(p_values, o_s, end, o_c, m_c, C)
        tl.store(mixes + (i_piece * B * H + i) * C + o_c, b_mix, m_c)
        tl.store(tops + i_piece * B * H + i, top)
        tl.store(tops + (i_piece + PIECES) * B * H + i, mass)
