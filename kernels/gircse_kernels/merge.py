"""The last kernel of the forward: partial softmax sums of all splits -> the result and its statistics.

    m = max_s m_s;  l = sum_s l_s e^(m_s - m);  out = scale * sum_s acc_s e^(m_s - m) / l

With FINISH = False (a vocabulary shard, whose merge with the other shards is still to come) `out` is the sum, not
divided, and the moment stays a moment. Traffic: `splits * T * E` float32 read, T * E written once or twice.
"""

import triton
import triton.language as tl

from .scores import LOG_FLOOR, LOWEST


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
