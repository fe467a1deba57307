"""Untied or wide matrices, and many rows: two tiled products for each chunk of the vocabulary.

`score_kernel` computes a tile of scores and, in the epilogue, its softmax against the tile's own maximum::

    for tile (i, j):  s = score(h_i W_j^T);  m_ij = max s;  P_ij = exp(s - m_ij);  l_ij = sum P_ij

`weigh_kernel` forms the weighted sum of its share of the chunk's tiles, each scaled after its product, and merges it
into the running softmax of its slot, which it alone owns, so that chunks and shares need no atomics::

    m = max_j m_ij (of the share);  acc = sum_j e^(m_ij - m) (P_ij E_j);  slot <- merge(slot, (m, l, acc))

The chunk's P [T, C], in the input's dtype, is all that exists of [T, V]. Traffic: W and E once each for few rows
(a chunk of a tied matrix is still in L2 for the second product), P written and read once through L2.
"""

import triton
import triton.language as tl

from .matmul import dot, grouped, row_dot
from .scores import LOG_FLOOR, LOWEST, row_factors, row_seeds, row_thresholds, scores, tile_softmax


@triton.jit(do_not_specialize=["seed", "vocab_start", "chunk_start", "num_rows"])
def score_kernel(
    hidden_ptr,  # [T, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    prob_ptr,  # [T, C] input dtype, out; with RAW: the scores themselves, float32
    tile_peak_ptr,  # [tiles, T] float32, out; the same for total, moment, argmax
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    num_rows,
    num_vocab,
    width,
    stride_hidden_t,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    stride_bias,
    stride_prob,
    vocab_start,
    chunk_start,  # the chunk's first row in this weight
    chunk_size,
    seed,
    scale,
    softcap,
    inverse_temperature,
    ALIGNED: tl.constexpr,
    STATS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_rows, i_tile = grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tl.cdiv(chunk_size, BLOCK_V), GROUP)
    rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    vocab = (chunk_start + column).to(tl.int64)
    m_vocab = column < chunk_size
    product = row_dot(
        hidden_ptr, weight_ptr, rows.to(tl.int64), vocab, m_rows, m_vocab, width,
        stride_hidden_t, stride_hidden_d, stride_weight_v, stride_weight_d, PRECISION, BLOCK_T, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    inverse = row_factors(temperature_ptr, rows[:, None], m_rows[:, None], inverse_temperature)
    seeds = row_seeds(seed_ptr, rows[:, None], m_rows[:, None], seed)
    thresholds = row_thresholds(threshold_ptr, rows[:, None], m_rows[:, None])
    score, _ = scores(
        product, vocab[None, :], inverse, seeds, thresholds,
        bias_ptr, threshold_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap, ALIGNED,
    )  # fmt: skip
    p_prob = prob_ptr + rows.to(tl.int64)[:, None] * stride_prob + column[None, :]
    inside = m_rows[:, None] & m_vocab[None, :]
    if RAW:
        tl.store(p_prob, score, mask=inside)
    else:
        score, highest, position = tile_softmax(score, m_vocab, STATS)
        relative = score - highest[:, None]
        prob = tl.exp(relative)
        tl.store(p_prob, prob.to(prob_ptr.dtype.element_ty), mask=inside)
        slot = i_tile * num_rows + rows
        tl.store(tile_peak_ptr + slot, highest, mask=m_rows)
        tl.store(tile_total_ptr + slot, tl.sum(prob, 1), mask=m_rows)
        if STATS:
            tl.store(tile_moment_ptr + slot, tl.sum(tl.maximum(relative, LOG_FLOOR) * prob, 1), mask=m_rows)
            index = chunk_start + i_tile * BLOCK_V + position
            tl.store(tile_argmax_ptr + slot, index.to(tl.int64), mask=m_rows)


@triton.jit(do_not_specialize=["chunk_start", "num_rows", "tiles_per_split"])
def weigh_kernel(
    prob_ptr,  # [T, C]
    value_ptr,  # [V, E]
    tile_peak_ptr,  # [tiles, T]
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    acc_ptr,  # [splits, T, E] float32, in and out
    old_peak_ptr,  # [splits, T] float32, in: every column block reads it, so the new one goes elsewhere
    new_peak_ptr,  # [splits, T] float32, out
    total_ptr,  # [splits, T] float32, in and out; the same for moment, argmax
    moment_ptr,
    argmax_ptr,
    num_rows,
    width,
    stride_prob,
    stride_value_v,
    stride_value_e,
    chunk_start,
    chunk_size,
    tiles_per_split,
    FIRST: tl.constexpr,  # the slot is empty
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,  # one product's part of a score tile
    TILE: tl.constexpr,  # columns of a score tile
    GROUP: tl.constexpr,
):
    i_rows, i_cols = grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tl.cdiv(width, BLOCK_E), GROUP)
    i_split = tl.program_id(1)
    rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    rows64 = rows.to(tl.int64)
    cols = i_cols * BLOCK_E + tl.arange(0, BLOCK_E)
    m_cols = cols < width
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(chunk_size, TILE))

    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    for i_tile in range(first, last):
        slot = i_tile * num_rows + rows
        peak = tl.maximum(peak, tl.load(tile_peak_ptr + slot, mask=m_rows, other=LOWEST))

    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    inner = tl.arange(0, BLOCK_V)
    for start in range(first * TILE, tl.minimum(last * TILE, chunk_size), BLOCK_V):
        column = start + inner
        m_column = column < chunk_size
        prob = tl.load(
            prob_ptr + rows64[:, None] * stride_prob + column[None, :],
            mask=m_rows[:, None] & m_column[None, :],
            other=0.0,
        )
        vocab = (chunk_start + column).to(tl.int64)
        value = tl.load(
            value_ptr + vocab[:, None] * stride_value_v + cols.to(tl.int64)[None, :] * stride_value_e,
            mask=m_column[:, None] & m_cols[None, :],
            other=0.0,
        )
        slot = (start // TILE) * num_rows + rows
        scale = tl.exp(tl.load(tile_peak_ptr + slot, mask=m_rows, other=LOWEST) - peak)
        acc += dot(prob, value, tl.zeros([BLOCK_T, BLOCK_E], tl.float32), PRECISION) * scale[:, None]

    slot = (i_split * num_rows + rows).to(tl.int64)
    p_acc = acc_ptr + slot[:, None] * width + cols[None, :]
    inside = m_rows[:, None] & m_cols[None, :]
    if FIRST:
        old_peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    else:
        old_peak = tl.load(old_peak_ptr + slot, mask=m_rows, other=LOWEST)
    new_peak = tl.maximum(old_peak, peak)
    old_scale = tl.exp(old_peak - new_peak)
    new_scale = tl.exp(peak - new_peak)
    acc *= new_scale[:, None]
    if not FIRST:
        acc += tl.load(p_acc, mask=inside, other=0.0) * old_scale[:, None]
    tl.store(p_acc, acc, mask=inside)

    if i_cols == 0:  # the one program of this slot's rows that also keeps the sums
        total = tl.zeros([BLOCK_T], tl.float32)
        moment = tl.zeros([BLOCK_T], tl.float32)
        argmax = tl.zeros([BLOCK_T], tl.int64)
        best = tl.full([BLOCK_T], LOWEST, tl.float32)
        if not FIRST:
            best = old_peak
            total = tl.load(total_ptr + slot, mask=m_rows, other=0.0) * old_scale
            if STATS:
                shift = tl.maximum(old_peak - new_peak, LOG_FLOOR)
                moment = tl.load(moment_ptr + slot, mask=m_rows, other=0.0) * old_scale + shift * total
                argmax = tl.load(argmax_ptr + slot, mask=m_rows, other=0)
        for i_tile in range(first, last):
            tile = i_tile * num_rows + rows
            tile_peak = tl.load(tile_peak_ptr + tile, mask=m_rows, other=LOWEST)
            shift = tile_peak - new_peak
            decay = tl.exp(shift)
            tile_total = tl.load(tile_total_ptr + tile, mask=m_rows, other=0.0) * decay
            total += tile_total
            if STATS:
                moment += tl.load(tile_moment_ptr + tile, mask=m_rows, other=0.0) * decay
                moment += tl.maximum(shift, LOG_FLOOR) * tile_total
                index = tl.load(tile_argmax_ptr + tile, mask=m_rows, other=0)
                argmax = tl.where(tile_peak > best, index, argmax)
                best = tl.maximum(best, tile_peak)
        tl.store(new_peak_ptr + slot, new_peak, mask=m_rows)
        tl.store(total_ptr + slot, total, mask=m_rows)
        if STATS:
            tl.store(moment_ptr + slot, moment, mask=m_rows)
            tl.store(argmax_ptr + slot, argmax, mask=m_rows)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "num_vocab"])
def merge_kernel(
    acc_ptr,  # [splits, T, E] float32
    peak_ptr,  # [splits, T] float32; the same for total, moment, argmax (int64)
    total_ptr,
    moment_ptr,
    argmax_ptr,
    out_ptr,  # [T, E] any dtype
    exact_ptr,  # [T, E] float32, what backward keeps
    new_peak_ptr,  # [T] float32; the same below
    new_total_ptr,
    lse_ptr,
    entropy_ptr,  # the moment where FINISH is False
    max_prob_ptr,
    new_argmax_ptr,  # int64
    num_rows,
    num_splits,
    num_vocab,
    width,
    embed_scale,
    FINISH: tl.constexpr,
    STATS: tl.constexpr,
    EXACT: tl.constexpr,
    SPLITS: tl.constexpr,  # power of two >= num_splits
    BLOCK_S: tl.constexpr,  # splits read at once
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i_cols = tl.program_id(1)
    cols = i_cols * BLOCK_E + tl.arange(0, BLOCK_E)
    m_cols = cols < width
    splits = tl.arange(0, SPLITS)
    m_splits = splits < num_splits
    slots = splits.to(tl.int64) * num_rows + row
    peaks = tl.load(peak_ptr + slots, mask=m_splits, other=LOWEST)
    peak = tl.max(peaks, 0)
    weights = tl.where(m_splits, tl.exp(peaks - peak), 0.0)
    totals = tl.load(total_ptr + slots, mask=m_splits, other=0.0) * weights
    total = tl.sum(totals, 0)

    acc = tl.zeros([BLOCK_E], tl.float32)
    inner = tl.arange(0, BLOCK_S)
    for start in range(0, num_splits, BLOCK_S):
        split = start + inner
        m_split = split < num_splits
        slot = split.to(tl.int64) * num_rows + row
        weight = tl.exp(tl.load(peak_ptr + slot, mask=m_split, other=LOWEST) - peak)
        part = tl.load(
            acc_ptr + slot[:, None] * width + cols[None, :], mask=m_split[:, None] & m_cols[None, :], other=0.0
        )
        acc += tl.sum(part * weight[:, None], 0)
    if FINISH:
        acc = acc * (embed_scale / total)
    if EXACT:
        tl.store(exact_ptr + row * width + cols, acc, mask=m_cols)
    tl.store(out_ptr + row * width + cols, acc.to(out_ptr.dtype.element_ty), mask=m_cols)

    if i_cols == 0:
        log_total = tl.log(total)
        tl.store(new_peak_ptr + row, peak)
        tl.store(new_total_ptr + row, total)
        tl.store(lse_ptr + row, peak + log_total)
        if STATS:
            moments = tl.load(moment_ptr + slots, mask=m_splits, other=0.0) * weights
            moments += tl.maximum(peaks - peak, LOG_FLOOR) * totals
            moment = tl.sum(moments, 0)
            if FINISH:
                moment = log_total - moment / total
            tl.store(entropy_ptr + row, moment)
            tl.store(max_prob_ptr + row, 1.0 / total)
            indices = tl.load(argmax_ptr + slots, mask=m_splits, other=0)
            # the lowest index of a tie; a row of NaN has none and takes 0
            best = tl.min(tl.where(m_splits & (peaks == peak), indices, num_vocab), 0)
            tl.store(new_argmax_ptr + row, tl.where(best < num_vocab, best, 0).to(tl.int64))
