"""One row, tied matrix, half precision, D <= 2048: the matrix is read once, by CUDA cores.

The vocabulary is split over the programs. A program takes BLOCK_V rows of W at a time. Each of these BLOCK_V lanes has
an online softmax of its own, so that nothing crosses lanes until the loop has ended::

    for tile W_j [BLOCK_V, D]:  s = score(sum_d W_j h);  m' = max(m, s);  p = e^(s - m')           m, l, s, p [BLOCK_V]
                                l = l e^(m - m') + p;  acc = acc e^(m - m') + p W_j;  m = m'       acc [BLOCK_V, D]

Then the lanes are added up, and the program writes one partial result for `merge`. D is held in pieces of PIECE
columns, the last one ragged. Traffic: W once, partials `splits * (D + 4)` float32 written and read.
"""

# mypy: disable-error-code="assignment, misc"
# A tuple grows in an unrolled loop, which mypy takes for one of a fixed length.

import triton
import triton.language as tl

from ..scores import LOG_FLOOR, LOWEST, row_options, scores
from .few_rows import piece_mask, strided


@triton.jit(do_not_specialize=["seed", "vocab_start", "tiles_per_split"])
def one_row_kernel(
    hidden_ptr,  # [1, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    temperature_ptr,  # [1]
    noise_scale_ptr,  # [1]
    seed_ptr,  # [1]
    threshold_ptr,  # [1]
    bitmask_ptr,  # [1, W] int32
    partial_ptr,  # float32, out; `merge` has the layout
    num_vocab,
    stride_bias,
    stride_bitmask,
    vocab_start,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    tiles_per_split,
    ALIGNED: tl.constexpr,
    STATS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_HIDDEN: tl.constexpr,
    STRIDE_V: tl.constexpr,  # of the weight; one value for each model, so that addresses cost little
    STRIDE_D: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr,
):
    i_split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    d = tl.arange(0, PIECE)
    hidden = ()
    acc = ()
    for j in tl.static_range(PIECES):
        m_d = d < WIDTH - j * PIECE
        piece = tl.load(hidden_ptr + strided(j * PIECE + d, STRIDE_HIDDEN), mask=m_d, other=0.0)
        hidden = hidden + (piece.to(tl.float32),)
        acc = acc + (tl.zeros([BLOCK_V, PIECE], tl.float32),)
    row = row_options(
        temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
        0, True, seed, inverse_temperature, noise_scale,
    )  # fmt: skip
    call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)

    peak = tl.full([BLOCK_V], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    moment = tl.zeros([BLOCK_V], tl.float32)
    argmax = tl.zeros([BLOCK_V], tl.int32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_vocab, BLOCK_V))
    for i_tile in tl.range(first, last, num_stages=STAGES):
        vocab = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        m_vocab = vocab < num_vocab
        p_weight = weight_ptr + vocab.to(tl.int64)[:, None] * STRIDE_V
        weight = ()
        for j in tl.static_range(PIECES):
            columns = strided((j * PIECE + d)[None, :], STRIDE_D)
            m_load = piece_mask(m_vocab[:, None], d[None, :], j * PIECE, PIECE, WIDTH)
            weight = weight + (tl.load(p_weight + columns, mask=m_load, other=0.0).to(tl.float32),)
        product = weight[0] * hidden[0][None, :]
        for j in tl.static_range(1, PIECES):
            product += weight[j] * hidden[j][None, :]
        score, _, _ = scores(tl.sum(product, 1), vocab, row, call, ALIGNED)
        score = tl.where(m_vocab, score, float("-inf"))
        new_peak = tl.maximum(peak, score)
        shift = peak - new_peak
        decay = tl.exp(shift)
        relative = score - new_peak
        prob = tl.exp(relative)
        if STATS:
            argmax = tl.where(score > peak, vocab, argmax)
            # the moment moves with the peak: sum e^(x + shift) (x + shift)
            moment = (moment + tl.maximum(shift, LOG_FLOOR) * total) * decay + tl.maximum(relative, LOG_FLOOR) * prob
        added = ()
        for j in tl.static_range(PIECES):
            added = added + (acc[j] * decay[:, None] + prob[:, None] * weight[j],)
        acc = added
        total = total * decay + prob
        peak = new_peak

    highest = tl.max(peak, 0)
    shift = peak - highest
    decay = tl.exp(shift)
    tl.store(partial_ptr + i_split, highest)
    tl.store(partial_ptr + num_splits + i_split, tl.sum(total * decay, 0))
    if STATS:
        moment = (moment + tl.maximum(shift, LOG_FLOOR) * total) * decay
        tl.store(partial_ptr + 2 * num_splits + i_split, tl.sum(moment, 0))
        best = tl.min(tl.where(peak == highest, argmax, num_vocab), 0)
        tl.store(partial_ptr + 3 * num_splits + i_split, best.to(tl.float32, bitcast=True))
    p_acc = partial_ptr + 4 * num_splits + i_split * WIDTH
    for j in tl.static_range(PIECES):
        tl.store(p_acc + j * PIECE + d, tl.sum(acc[j] * decay[:, None], 0), mask=d < WIDTH - j * PIECE)
