"""Up to 32 rows, or 16 where D > 1024; tied, half precision, D <= 2048: one read of a tile of W serves both products.

The vocabulary is split over the programs (flash decoding). A program keeps its rows' hidden states and accumulators,
walks the tiles of its share with an online softmax, and writes one partial result for `merge`::

    for tile W_j [BLOCK_V, D]:  s = score(h W_j^T);  m' = max(m, max s);  p = e^(s - m')
                                l = l e^(m - m') + sum p;  acc = acc e^(m - m') + p W_j;  m = m'

D is held in pieces of PIECE columns, the last one ragged, each with an accumulator of its own: no padding to a power of
two, and short chains of dependent products. With GROUPS = 1 the warps divide a tile's vocabulary entries, and each of
them reads all of h from shared memory for every tile. Beyond D = 1024 that traffic decides, so GROUPS = num_warps makes
each piece a batch of products, a group of columns for each warp: a warp reads its own columns of h and W alone, and the
scores [BLOCK_T, BLOCK_V] are added up over the warps.

Traffic: W once from memory (blocks of rows that share a tile run side by side and meet in L2), partials
`splits * T * (D + 4)` float32 written and read.
"""

# mypy: disable-error-code="assignment, misc"
# A tuple grows in an unrolled loop, which mypy takes for one of a fixed length.

import triton
import triton.language as tl

from ..matmul import dot
from ..scores import LOG_FLOOR, LOWEST, row_options, scores, tile_softmax


@triton.jit
def piece_columns(PIECE: tl.constexpr, GROUPS: tl.constexpr):
    """Columns of a piece: [1, PIECE], or [GROUPS, 1, PIECE / GROUPS]."""
    if GROUPS == 1:
        return tl.arange(0, PIECE)[None, :]
    else:
        width: tl.constexpr = PIECE // GROUPS
        return tl.arange(0, GROUPS)[:, None, None] * width + tl.arange(0, width)[None, None, :]


@triton.jit
def grouped_column(x, GROUPS: tl.constexpr):
    """A vector [N] against which a piece broadcasts: [N, 1], or [1, N, 1]."""
    if GROUPS == 1:
        return x[:, None]
    else:
        return x[None, :, None]


@triton.jit
def piece_mask(m_rows, columns, START: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """Mask of a piece that starts at column START. Only the ragged last piece compares columns."""
    if START + PIECE > WIDTH:
        return m_rows & (columns < WIDTH - START)
    else:
        return m_rows


@triton.jit
def strided(columns, STRIDE: tl.constexpr):
    """columns * STRIDE, in 64 bits where that is not the columns themselves."""
    if STRIDE == 1:
        return columns
    else:
        return columns.to(tl.int64) * STRIDE


@triton.jit
def piece_product(hidden, weight, PRECISION: tl.constexpr, GROUPS: tl.constexpr):
    """hidden weight^T, float32: [BLOCK_T, BLOCK_V], or one for each group."""
    if GROUPS == 1:
        zeros = tl.zeros([hidden.shape[0], weight.shape[0]], tl.float32)
        return dot(hidden, tl.trans(weight), zeros, PRECISION)
    else:
        zeros = tl.zeros([GROUPS, hidden.shape[1], weight.shape[1]], tl.float32)
        return dot(hidden, tl.trans(weight, 0, 2, 1), zeros, PRECISION)


@triton.jit(do_not_specialize=["seed", "vocab_start", "tiles_per_split", "row_blocks", "num_splits"])
def few_rows_kernel(
    hidden_ptr,  # [T, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    noise_scale_ptr,  # [T]
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    bitmask_ptr,  # [T, W] int32
    partial_ptr,  # float32, out; `merge` has the layout
    num_rows,
    num_vocab,
    stride_hidden,  # from row to row
    stride_bias,
    stride_bitmask,
    vocab_start,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    tiles_per_split,
    row_blocks,
    num_splits,
    ALIGNED: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_HIDDEN: tl.constexpr,  # from column to column
    STRIDE_V: tl.constexpr,  # of the weight; one value for each model, so that addresses cost little
    STRIDE_D: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    i_split = tl.program_id(0) // row_blocks  # neighbours share a tile of W
    rows = (tl.program_id(0) % row_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    columns = piece_columns(PIECE, GROUPS)
    p_hidden = hidden_ptr + grouped_column(rows.to(tl.int64), GROUPS) * stride_hidden + strided(columns, STRIDE_HIDDEN)
    hidden = ()
    acc = ()
    for j in tl.static_range(PIECES):
        inside = piece_mask(grouped_column(m_rows, GROUPS), columns, j * PIECE, PIECE, WIDTH)
        hidden = hidden + (tl.load(p_hidden + j * PIECE * STRIDE_HIDDEN, mask=inside, other=0.0),)
        acc = acc + (tl.zeros(hidden[0].shape, tl.float32),)
    row = row_options(
        temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
        rows[:, None], m_rows[:, None], seed, inverse_temperature, noise_scale,
    )  # fmt: skip
    call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)

    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    moment = tl.zeros([BLOCK_T], tl.float32)
    argmax = tl.zeros([BLOCK_T], tl.int32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_vocab, BLOCK_V))
    for i_tile in tl.range(first, last, num_stages=STAGES):
        vocab = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        m_vocab = vocab < num_vocab
        p_weight = weight_ptr + grouped_column(vocab.to(tl.int64), GROUPS) * STRIDE_V + strided(columns, STRIDE_D)
        weight = ()
        for j in tl.static_range(PIECES):
            m_weight = piece_mask(grouped_column(m_vocab, GROUPS), columns, j * PIECE, PIECE, WIDTH)
            weight = weight + (tl.load(p_weight + j * PIECE * STRIDE_D, mask=m_weight, other=0.0),)
        product = piece_product(hidden[0], weight[0], PRECISION, GROUPS)
        for j in tl.static_range(1, PIECES):
            product += piece_product(hidden[j], weight[j], PRECISION, GROUPS)
        if GROUPS > 1:
            product = tl.sum(product, 0)
        score, _, _ = scores(product, vocab[None, :], row, call, ALIGNED)
        score, highest, position = tile_softmax(score, m_vocab, STATS)
        new_peak = tl.maximum(peak, highest)
        shift = peak - new_peak
        decay = tl.exp(shift)
        relative = score - new_peak[:, None]
        prob = tl.exp(relative)
        if STATS:
            argmax = tl.where(highest > peak, i_tile * BLOCK_V + position, argmax)
            # the moment moves with the peak: sum e^(x + shift) (x + shift)
            moment = (moment + tl.maximum(shift, LOG_FLOOR) * total) * decay
            moment += tl.sum(tl.maximum(relative, LOG_FLOOR) * prob, 1)
        total = total * decay + tl.sum(prob, 1)
        peak = new_peak
        prob = prob.to(weight_ptr.dtype.element_ty)
        if GROUPS > 1:
            prob = tl.broadcast_to(prob[None, :, :], [GROUPS, BLOCK_T, BLOCK_V])
        added = ()
        for j in tl.static_range(PIECES):
            added = added + (dot(prob, weight[j], acc[j] * grouped_column(decay, GROUPS), PRECISION),)
        acc = added

    plane = num_splits * num_rows
    slot = i_split * num_rows + rows
    tl.store(partial_ptr + slot, peak, mask=m_rows)
    tl.store(partial_ptr + plane + slot, total, mask=m_rows)
    if STATS:
        tl.store(partial_ptr + 2 * plane + slot, moment, mask=m_rows)
        tl.store(partial_ptr + 3 * plane + slot, argmax.to(tl.float32, bitcast=True), mask=m_rows)
    p_acc = partial_ptr + 4 * plane + grouped_column(slot.to(tl.int64), GROUPS) * WIDTH + columns
    for j in tl.static_range(PIECES):
        inside = piece_mask(grouped_column(m_rows, GROUPS), columns, j * PIECE, PIECE, WIDTH)
        tl.store(p_acc + j * PIECE, acc[j], mask=inside)
