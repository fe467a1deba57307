"""The last kernel of every forward: partial softmax sums -> the result and its statistics.

    m = max_s m_s;  l = sum_s l_s e^(m_s - m);  out = scale * sum_s acc_s e^(m_s - m) / l

Partials are one flat float32 tensor: the planes peak, total, moment and argmax (int32 bits), [splits, T] each, then acc
[splits, T, E]. With FINISH = False (a vocabulary shard, whose sums are still to be merged with those of other shards)
`out` is the sum, not divided, and the moment stays a moment. Traffic: `splits * T * (E + 4)` float32 read, T * E
written once or twice.
"""

import triton
import triton.language as tl

from ..scores import LOG_FLOOR, LOWEST


@triton.jit(do_not_specialize=["num_rows", "num_splits", "num_vocab"])
def merge_kernel(
    partial_ptr,
    out_ptr,  # [T, E] any dtype
    exact_ptr,  # [T, E] float32, what backward keeps; None: not wanted
    peak_ptr,  # [T] float32; None: not wanted; the same below
    total_ptr,
    lse_ptr,
    entropy_ptr,  # the moment where FINISH is False
    max_prob_ptr,
    argmax_ptr,  # int64
    num_rows,
    num_splits,
    num_vocab,
    width,
    embed_scale,
    FINISH: tl.constexpr,
    SPLITS: tl.constexpr,  # power of two >= num_splits
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_columns = columns < width
    splits = tl.arange(0, SPLITS)
    m_splits = splits < num_splits
    slots = splits.to(tl.int64) * num_rows + row
    plane = num_splits.to(tl.int64) * num_rows
    peaks = tl.load(partial_ptr + slots, mask=m_splits, other=LOWEST)
    peak = tl.max(peaks, 0)
    weights = tl.exp(peaks - peak)
    totals = tl.load(partial_ptr + plane + slots, mask=m_splits, other=0.0) * weights
    total = tl.sum(totals, 0)
    p_acc = partial_ptr + 4 * plane + slots[:, None] * width + columns[None, :]
    acc = tl.load(p_acc, mask=m_splits[:, None] & m_columns[None, :], other=0.0)
    out = tl.sum(acc * weights[:, None], 0)
    if FINISH:
        out = out * (embed_scale / total)
    if exact_ptr is not None:
        tl.store(exact_ptr + row * width + columns, out, mask=m_columns)
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=m_columns)

    if tl.program_id(1) == 0:
        log_total = tl.log(total)
        if peak_ptr is not None:
            tl.store(peak_ptr + row, peak)
            tl.store(total_ptr + row, total)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, peak + log_total)
        if entropy_ptr is not None:
            moments = tl.load(partial_ptr + 2 * plane + slots, mask=m_splits, other=0.0) * weights
            moment = tl.sum(moments + tl.maximum(peaks - peak, LOG_FLOOR) * totals, 0)
            if FINISH:
                moment = log_total - moment / total
            tl.store(entropy_ptr + row, moment)
            tl.store(max_prob_ptr + row, 1.0 / total)
            bits = tl.load(partial_ptr + 3 * plane + slots, mask=m_splits, other=0.0)
            # the lowest index of a tie; a row of NaN has none and takes 0
            best = tl.min(tl.where(m_splits & (peaks == peak), bits.to(tl.int32, bitcast=True), num_vocab), 0)
            tl.store(argmax_ptr + row, tl.where(best < num_vocab, best, 0).to(tl.int64))
