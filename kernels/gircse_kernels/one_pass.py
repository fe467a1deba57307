"""Few rows, tied matrix, D <= 2048: each tile of W is read once and serves scores and weighted sum (flash decoding).

The vocabulary is split over the programs. A program keeps its rows' whole hidden states and whole accumulators, walks
the tiles of its share with an online softmax, and writes one partial result; `merge` adds them up::

    for tile W_j [BLOCK_V, D]:  s = score(h W_j^T);  m' = max(m, max s);  p = exp(s - m')
                                l = l e^(m - m') + sum p;  acc = acc e^(m - m') + p W_j;  m = m'

Traffic: W once from memory (row blocks of the same share run side by side and meet in L2), partials
`splits * T * (D + 2)` float32 written and read. A width that is no power of two is held in two power-of-two pieces.
"""

import triton
import triton.language as tl

from .matmul import dot
from .scores import LOG_FLOOR, LOWEST, row_factors, row_seeds, row_thresholds, scores, tile_softmax


@triton.jit(do_not_specialize=["seed", "vocab_start", "num_rows", "tiles_per_split", "row_blocks"])
def one_pass_kernel(
    hidden_ptr,  # [T, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    acc_ptr,  # [splits, T, D] float32, out
    peak_ptr,  # [splits, T] float32, out; the same for total, moment, argmax
    total_ptr,
    moment_ptr,
    argmax_ptr,
    num_rows,
    num_vocab,
    width,
    stride_hidden_t,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    stride_bias,
    vocab_start,
    seed,
    scale,
    softcap,
    inverse_temperature,
    tiles_per_split,
    row_blocks,
    ALIGNED: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
):
    # neighbours share a tile of W
    i_split = tl.program_id(0) // row_blocks
    i_rows = tl.program_id(0) % row_blocks
    rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    rows64 = rows.to(tl.int64)
    d_0 = tl.arange(0, WIDTH_0)
    m_0 = d_0 < width
    p_hidden = hidden_ptr + rows64[:, None] * stride_hidden_t
    hidden_0 = tl.load(p_hidden + d_0[None, :] * stride_hidden_d, mask=m_rows[:, None] & m_0[None, :], other=0.0)
    acc_0 = tl.zeros([BLOCK_T, WIDTH_0], tl.float32)
    if WIDTH_1 > 0:
        d_1 = WIDTH_0 + tl.arange(0, WIDTH_1)
        m_1 = d_1 < width
        hidden_1 = tl.load(p_hidden + d_1[None, :] * stride_hidden_d, mask=m_rows[:, None] & m_1[None, :], other=0.0)
        acc_1 = tl.zeros([BLOCK_T, WIDTH_1], tl.float32)
    inverse = row_factors(temperature_ptr, rows[:, None], m_rows[:, None], inverse_temperature)
    seeds = row_seeds(seed_ptr, rows[:, None], m_rows[:, None], seed)
    thresholds = row_thresholds(threshold_ptr, rows[:, None], m_rows[:, None])

    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    moment = tl.zeros([BLOCK_T], tl.float32)
    argmax = tl.zeros([BLOCK_T], tl.int64)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_vocab, BLOCK_V))
    for i_tile in range(first, last):
        vocab = (i_tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        m_vocab = vocab < num_vocab
        p_weight = weight_ptr + vocab[:, None] * stride_weight_v
        weight_0 = tl.load(p_weight + d_0[None, :] * stride_weight_d, mask=m_vocab[:, None] & m_0[None, :], other=0.0)
        product = dot(hidden_0, tl.trans(weight_0), tl.zeros([BLOCK_T, BLOCK_V], tl.float32), PRECISION)
        if WIDTH_1 > 0:
            weight_1 = tl.load(
                p_weight + d_1[None, :] * stride_weight_d, mask=m_vocab[:, None] & m_1[None, :], other=0.0
            )
            product = dot(hidden_1, tl.trans(weight_1), product, PRECISION)
        score, _ = scores(
            product, vocab[None, :], inverse, seeds, thresholds,
            bias_ptr, threshold_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap, ALIGNED,
        )  # fmt: skip
        score, highest, position = tile_softmax(score, m_vocab, STATS)
        new_peak = tl.maximum(peak, highest)
        shift = peak - new_peak
        decay = tl.exp(shift)
        relative = score - new_peak[:, None]
        prob = tl.exp(relative)
        if STATS:
            argmax = tl.where(highest > peak, (i_tile * BLOCK_V + position).to(tl.int64), argmax)
            # the moment moves with the peak: sum e^(x + shift) (x + shift)
            moment = (moment + tl.maximum(shift, LOG_FLOOR) * total) * decay
            moment += tl.sum(tl.maximum(relative, LOG_FLOOR) * prob, 1)
        total = total * decay + tl.sum(prob, 1)
        peak = new_peak
        prob = prob.to(weight_0.dtype)
        acc_0 = dot(prob, weight_0, acc_0 * decay[:, None], PRECISION)
        if WIDTH_1 > 0:
            acc_1 = dot(prob, weight_1, acc_1 * decay[:, None], PRECISION)

    slot = (i_split * num_rows + rows).to(tl.int64)
    p_acc = acc_ptr + slot[:, None] * width
    tl.store(p_acc + d_0[None, :], acc_0, mask=m_rows[:, None] & m_0[None, :])
    if WIDTH_1 > 0:
        tl.store(p_acc + d_1[None, :], acc_1, mask=m_rows[:, None] & m_1[None, :])
    tl.store(peak_ptr + slot, peak, mask=m_rows)
    tl.store(total_ptr + slot, total, mask=m_rows)
    if STATS:
        tl.store(moment_ptr + slot, moment, mask=m_rows)
        tl.store(argmax_ptr + slot, argmax, mask=m_rows)
