"""Triton kernels that decode one token: seven per block, which read its weights once.

| kernel | reads | writes |
| --- | --- | --- |
| scores of query, key, value | x + partials of the previous ffn, three K | scores, the new x |
| values of query, key, value | scores, three V | partials of q, k, v |
| attention | partials of q, k, v, the cache | new slot of the cache, outputs of its splits |
| scores, values of output | outputs of the splits, K; scores, V | scores; partials |
| scores, values of ffn | x + partials of output, K; scores, V | scores, the new x; partials |

One row is too little work to give each sum to a single program. So sums are split into
partial sums, the partials, which each reader adds in the same order: no atomics, and the same bits
every time. All arrays between the weights are float32.

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
def _select(i_g, a, b, c, G: tl.constexpr):
    """Return the argument of layer i_g."""
    if G == 1:
        return a
    return tl.where(i_g == 0, a, tl.where(i_g == 1, b, c))


@triton.jit
def _wait_for_previous(OVERLAP: tl.constexpr):
    """Wait for the end of all previous kernels; let the next kernel start and wait too.

    Before this call, a kernel writes nothing, and reads only what no kernel of the step writes:
    weights, the slot of the token, starts of texts, the rotary table and earlier slots. All
    programs of all kernels wait. When one continues, the previous kernel has ended, and so have all
    before it. So the code after this call runs as if no two kernels overlapped, and buffers may be
    reused. PyTorch's kernels, before the first and after the last one, overlap with none.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _finite_max(b_max):
    """Return a maximum that can be subtracted: 0 for the -inf of an empty set."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def _add_partials(
    x, partials, x_next, i_b, first, o, m, D: tl.constexpr, B: tl.constexpr, PARTIALS
):
    """Return x [B, D] plus its PARTIALS partial sums; the first program stores it as x_next."""
    b_x = tl.load(x + i_b * D + o, m, 0.0).to(tl.float32)
    for j in tl.static_range(PARTIALS):
        b_x += tl.load(partials + (i_b + j * B) * D + o, m, 0.0)
    if PARTIALS > 0:
        tl.store(x_next + i_b * D + o, b_x, m & first)
    return b_x


@triton.jit
def _layer_norm(b_x, m, eps, D: tl.constexpr):
    """Return the layer norm without affine."""
    b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
    return b_x / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)


@triton.jit
def _split_size(last, SPLITS: tl.constexpr, SLOTS: tl.constexpr):
    """Return the slots of a split if the last used one is `last`."""
    return tl.cdiv(tl.cdiv(last + 1, SPLITS), SLOTS) * SLOTS


@triton.jit
def _combine_splits(
    split_outs,
    split_stats,
    last,
    i_b,
    D: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine the attention outputs of the splits [D]; GROUP channels belong to one head."""
    size = _split_size(last, SPLITS, SLOTS)
    o = tl.arange(0, BLOCK // GROUP) * GROUP  # one statistic of a head per group of channels
    o_d = o[:, None] + tl.arange(0, GROUP)[None, :]
    b_max = tl.full(o.shape, float("-inf"), tl.float32)
    b_sum = tl.zeros(o.shape, tl.float32)
    b_x = tl.zeros(o_d.shape, tl.float32)
    for j in tl.static_range(SPLITS):
        m = (o < D) & (size * j <= last)
        o_head = (i_b + j * B) * (D // C) + o // C
        b_t = tl.load(split_stats + o_head, m, float("-inf"))
        b_m = tl.load(split_stats + SPLITS * B * (D // C) + o_head, m, 0.0)
        b_o = tl.load(split_outs + (i_b + j * B) * D + o_d, m[:, None], 0.0)
        b_new_max = tl.maximum(b_max, b_t)
        b_old = tl.exp2((b_max - _finite_max(b_new_max)) * LOG2_E)
        b_new = tl.exp2((b_t - _finite_max(b_new_max)) * LOG2_E)
        b_x = b_x * b_old[:, None] + b_o * b_new[:, None]
        b_sum = b_sum * b_old + b_m * b_new
        b_max = b_new_max
    b_x *= (1.0 / tl.where(b_sum > 0, b_sum, 1.0))[:, None]
    return tl.reshape(b_x, [BLOCK])


@triton.jit
def _load_key_rows(p_k, row, n, o_r, o_d, m_d, D: tl.constexpr):
    """Load rows [ROWS, BLOCK] of K, starting at `row`."""
    m = (row + o_r < n)[:, None] & m_d[None, :]
    return tl.load(p_k + row * D + o_r[:, None] * D + o_d[None, :], m, 0.0)


@triton.jit
def scores_kernel(
    x,
    partials,
    x_next,
    split_outs,
    split_stats,
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
    FROM_ATTENTION: tl.constexpr,
    PARTIALS: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute scores [G, B, N], and maxima and sums [2, G, B, P] of each of P programs.

    The input is the norm of x [B, D] + partials [PARTIALS, B, D], or with FROM_ATTENTION the
    combined output of the splits.
    """
    i_b, i, i_g = tl.program_id(0) % B, tl.program_id(0) // B, tl.program_id(1)
    programs = tl.num_programs(0) // B
    n = _select(i_g, n0, n1, n2, G)
    p_k = _select(i_g, k0, k1, k2, G)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_d = o_d < D
    # The first weights are requested before all other reads.
    b_k = _load_key_rows(p_k, i * ROWS, n, o_r, o_d, m_d, D)
    if FROM_ATTENTION:
        last = tl.load(slot).to(tl.int32)
    _wait_for_previous(OVERLAP)
    if FROM_ATTENTION:
        b_x = _combine_splits(
            split_outs, split_stats, last, i_b, D, B, C, GROUP, SPLITS, SLOTS, BLOCK
        )
    else:
        first = (i == 0) & (i_g == 0)
        b_x = _add_partials(x, partials, x_next, i_b, first, o_d, m_d, D, B, PARTIALS)
        b_x = _layer_norm(b_x, m_d, eps, D)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for block in range(i, tl.cdiv(n, ROWS), programs):
        b_next = _load_key_rows(p_k, (block + programs) * ROWS, n, o_r, o_d, m_d, D)
        b_s = tl.sum(b_k.to(tl.float32) * b_x[None, :], 1)
        o_n = block * ROWS + o_r
        tl.store(scores + (i_g * B + i_b) * N + o_n, b_s, o_n < n)
        if ACTIVATION == SOFTMAX:
            b_s = tl.where(o_n < n, b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, b_s)
            b_sum *= tl.exp2((b_max - _finite_max(b_new_max)) * LOG2_E)
            b_sum += tl.exp2((b_s - _finite_max(b_new_max)) * LOG2_E)
            b_max = b_new_max
        elif ACTIVATION == GELU_L2_NORM:
            b_g = b_s * normal_cdf(b_s, EXACT)
            b_sum += b_g * b_g
        else:
            b_sum += b_s * b_s
        b_k = b_next
    p_stats = stats + (i_g * B + i_b) * programs + i
    row_max = tl.max(b_max, 0)
    if ACTIVATION == SOFTMAX:
        tl.store(p_stats, row_max)
        b_sum *= tl.exp2((b_max - _finite_max(row_max)) * LOG2_E)
    tl.store(p_stats + programs * G * B, tl.sum(b_sum, 0))


@triton.jit
def _row_scale(
    p_stats, tau, P: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION, BLOCK: tl.constexpr
):
    """Return the maximum of all scores, and the factor of each exponential, GELU or score."""
    o = tl.arange(0, BLOCK)
    b_sum = tl.load(p_stats + STRIDE + o, o < P, 0.0)
    row_max = 0.0
    if ACTIVATION == SOFTMAX:
        b_max = tl.load(p_stats + o, o < P, float("-inf"))
        row_max = tl.max(b_max, 0)
        return row_max, tau * tau / tl.sum(b_sum * tl.exp2((b_max - row_max) * LOG2_E), 0)
    norm = tl.sqrt(tl.sum(b_sum, 0))
    return row_max, tl.where(norm > MIN_NORM, tau / tl.where(norm > MIN_NORM, norm, 1.0), 0.0)


@triton.jit
def _load_value_rows(p_v, row, n, o_r, o_e, E: tl.constexpr):
    """Load columns o_e of rows [ROWS, COLUMNS] of V, starting at `row`."""
    m = (row + o_r < n)[:, None] & (o_e < E)[None, :]
    return tl.load(p_v + row * E + o_r[:, None] * E + o_e[None, :], m, 0.0)


@triton.jit
def values_kernel(
    scores,
    stats,
    v0,
    v1,
    v2,
    partials,
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
    PARTIALS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute partial sums [G, PARTIALS, B, E] of weights times V, from scores and their stats.

    The inputs are scores [G, B, N] and stats [2, G, B, P]. A partial sum covers every PARTIALS-th
    tile of the rows of a layer.
    """
    i_b, i_e = tl.program_id(0) % B, tl.program_id(0) // B
    i_partial, i_g = tl.program_id(1), tl.program_id(2)
    n = _select(i_g, n0, n1, n2, G)
    p_v = _select(i_g, v0, v1, v2, G)
    o_r, o_e = tl.arange(0, ROWS), i_e * COLUMNS + tl.arange(0, COLUMNS)
    b_v = _load_value_rows(p_v, i_partial * ROWS, n, o_r, o_e, E)
    b_next = _load_value_rows(p_v, (i_partial + PARTIALS) * ROWS, n, o_r, o_e, E)
    _wait_for_previous(OVERLAP)
    tau = _select(i_g, tau0, tau1, tau2, G)
    row_max, scale = _row_scale(stats + (i_g * B + i_b) * P, tau, P, G * B * P, ACTIVATION, P_BLOCK)
    b_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(i_partial * ROWS, n, PARTIALS * ROWS):
        m_r = row + o_r < n
        b_s = tl.load(scores + (i_g * B + i_b) * N + row + o_r, m_r, 0.0)
        if ACTIVATION == SOFTMAX:
            b_w = tl.exp2((tl.where(m_r, b_s, row_max) - row_max) * LOG2_E) * scale
        elif ACTIVATION == GELU_L2_NORM:
            b_w = b_s * normal_cdf(b_s, EXACT) * scale
        else:
            b_u = b_s * scale
            b_w = b_u * normal_cdf(b_u, EXACT)
        b_acc += b_w[:, None] * b_v.to(tl.float32)
        b_v = b_next
        b_next = _load_value_rows(p_v, row + PARTIALS * ROWS * 2, n, o_r, o_e, E)
    p_partial = partials + ((i_g * PARTIALS + i_partial) * B + i_b) * E
    tl.store(p_partial + o_e, tl.sum(b_acc, 0), o_e < E)


@triton.jit
def _load_slots(p, o_s, end, o_c, m_c, C: tl.constexpr):
    """Load slots [SLOTS, BLOCK] before `end` of the cache of a head."""
    return tl.load(p + o_s[:, None] * C + o_c[None, :], (o_s < end)[:, None] & m_c[None, :], 0.0)


@triton.jit
def _load_head(p_partials, o, m, STRIDE: tl.constexpr, PARTIALS: tl.constexpr):
    """Return channels o of a head, the sum of their partial sums."""
    b = tl.zeros(o.shape, tl.float32)
    for j in tl.static_range(PARTIALS):
        b += tl.load(p_partials + o + j * STRIDE, m, 0.0)
    return b


@triton.jit
def _load_rotated_head(
    p_partials, p_cos, p_sin, o, m, R: tl.constexpr, STRIDE: tl.constexpr, PARTIALS
):
    """Return channels o of a head, the first R rotated: half-split, as in model/rotary.py."""
    b = _load_head(p_partials, o, m, STRIDE, PARTIALS)
    if R > 0:
        m_r, m_low = o < R, o < R // 2
        b_other = _load_head(
            p_partials, tl.where(m_low, o + R // 2, o - R // 2), m_r, STRIDE, PARTIALS
        )
        b_other = tl.where(m_low, -b_other, b_other)
        b = b * tl.load(p_cos + o, m_r, 1.0) + b_other * tl.load(p_sin + o, m_r, 0.0)
    return b


@triton.jit
def attention_kernel(
    partials,
    cos,
    sin,
    slot,
    starts,
    keys,
    values,
    split_outs,
    split_stats,
    scale,
    S,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    PARTIALS: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute the attention output of each split of the cache.

    The inputs are the partial sums [3, PARTIALS, B, H * C] of q, k and v. The key and value of the
    token are stored in its slot of keys and values [B, H, S, C]. Slots after it are not read, nor
    are splits without a slot up to it. With PADDED, slots before the start of a text, in starts
    [B], get no weight. split_outs [SPLITS, B, H * C] are sums of exp(score - maximum) value.
    split_stats [2, SPLITS, B, H] are the maximum, -inf if no slot has weight, and the sum of the
    factors.
    """
    i, i_split = tl.program_id(0), tl.program_id(1)  # i = i_b * H + i_h
    last = tl.load(slot).to(tl.int32)
    first = 0
    if PADDED:
        first = tl.load(starts + i // H).to(tl.int32)
    size = _split_size(last, SPLITS, SLOTS)
    start = i_split * size
    end = tl.minimum(start + size, last)  # of the slots filled before this token
    o_c, o_s = tl.arange(0, BLOCK), start + tl.arange(0, SLOTS)
    m_c = o_c < C
    p_keys, p_values = keys + i.to(tl.int64) * S * C, values + i.to(tl.int64) * S * C
    b_keys = _load_slots(p_keys, o_s, end, o_c, m_c, C)
    b_values = _load_slots(p_values, o_s, end, o_c, m_c, C)
    _wait_for_previous(OVERLAP)
    if start <= last:
        p_q = partials + i * C
        p_cos, p_sin = cos + (last - first) * R, sin + (last - first) * R
        kind = keys.dtype.element_ty
        b_q = _load_rotated_head(p_q, p_cos, p_sin, o_c, m_c, R, B * H * C, PARTIALS) * scale
        p_q += PARTIALS * B * H * C
        b_k = _load_rotated_head(p_q, p_cos, p_sin, o_c, m_c, R, B * H * C, PARTIALS).to(kind)
        p_q += PARTIALS * B * H * C
        b_v = _load_head(p_q, o_c, m_c, B * H * C, PARTIALS).to(kind)
        if last < start + size:
            tl.store(p_keys + last * C + o_c, b_k, m_c)
            tl.store(p_values + last * C + o_c, b_v, m_c)
        row_max, row_sum = float("-inf"), 0.0
        b_out = tl.zeros([BLOCK], tl.float32)
        for _ in range(start, tl.minimum(start + size, last + 1), SLOTS):
            m_token = (o_s == last)[:, None]
            b_s = tl.sum(tl.where(m_token, b_k[None, :], b_keys).to(tl.float32) * b_q[None, :], 1)
            b_s = tl.where(o_s <= last, b_s, float("-inf"))
            if PADDED:
                b_s = tl.where(o_s >= first, b_s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(b_s, 0))
            finite = _finite_max(new_max) if PADDED else new_max
            b_w = tl.exp2((b_s - finite) * LOG2_E)
            rescale = tl.exp2((row_max - finite) * LOG2_E)
            b_v_all = tl.where(m_token, b_v[None, :], b_values).to(tl.float32)
            b_out = b_out * rescale + tl.sum(b_v_all * b_w[:, None], 0)
            row_sum = row_sum * rescale + tl.sum(b_w, 0)
            row_max = new_max
            o_s += SLOTS
            b_keys = _load_slots(p_keys, o_s, end, o_c, m_c, C)
            b_values = _load_slots(p_values, o_s, end, o_c, m_c, C)
        tl.store(split_outs + (i_split * B * H + i) * C + o_c, b_out, m_c)
        tl.store(split_stats + i_split * B * H + i, row_max)
        tl.store(split_stats + (i_split + SPLITS) * B * H + i, row_sum)
