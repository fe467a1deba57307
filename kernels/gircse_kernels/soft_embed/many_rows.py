"""Form 3 of the forward, for everything that forms 1 and 2 do not take: two products for each chunk of the vocabulary.

    S = h W_c^T                                           cuBLAS; logits that are given are read where they are
    P = e^(score(S) - r),  tile by tile                   `weights_kernel`
    running sums <- sums of the tiles, P <- P e^(r - r')  `settle_kernel`; it touches P only where r differs from r'
    acc = acc + P E_c                                     cuBLAS, accumulated in float32

or, in place of the first two, our own product whose epilogue makes P of a tile while that is still in registers
(`weights_product_kernel`: persistent programs, tiles by tensor descriptors). Then only P leaves the multiprocessor.

The *reference* r of a row is its highest score so far, rounded down to a multiple of 8 (`reference`). At the row's peak
P lies between e^0 and e^8, which float16 holds, too, and most tiles of a row agree on r, so that P and the accumulator
are rarely rescaled. A tile whose highest score outgrows the row's reference uses a reference of its own; afterwards
`settle_kernel` brings everything to the new one. So the result is exact whatever the scores, without a pass for the
maximum and without waiting for the device.

Of [T, V] there is one chunk of P in the dtype of E, and of S unless that takes the same memory or is given.
"""

import triton
import triton.language as tl

from ..matmul import dot
from ..scores import LOG_FLOOR, LOWEST, reference, row_options, scores, tile_softmax


@triton.jit
def store_sums(
    score,  # [BLOCK_T, BLOCK_V] float32
    m_vocab,
    rows,
    m_rows,
    i_tile,
    num_tiles,
    first_index,  # vocabulary index of the tile's first column
    peak_ptr,
    tile_peak_ptr,
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    group_max_ptr,
    num_groups,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    STATS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """P of a tile in DTYPE; its highest score and its sums, relative to its reference, go to memory, and the highest
    scores of its groups where they are wanted."""
    score, highest, position = tile_softmax(score, m_vocab, STATS)
    if group_max_ptr is not None:
        count: tl.constexpr = score.shape[1] // GROUP
        maxima = tl.maximum(tl.max(tl.reshape(score, [score.shape[0], count, GROUP]), 2), LOWEST)
        groups = i_tile * count + tl.arange(0, count)
        m_groups = m_rows[:, None] & (groups < num_groups)[None, :]
        tl.store(group_max_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], maxima, mask=m_groups)
    if FIRST:
        base = reference(highest)
    else:
        base = reference(tl.maximum(highest, tl.load(peak_ptr + rows, mask=m_rows, other=LOWEST)))
    relative = score - base[:, None]
    prob = tl.exp(relative)
    rounded = prob.to(DTYPE)
    if not STATS:
        # What is multiplied is what is divided by: a row of one probability gives that entry's embedding, unrounded.
        # Statistics are of the sum before rounding.
        prob = rounded.to(tl.float32)
    slot = rows.to(tl.int64) * num_tiles + i_tile
    tl.store(tile_peak_ptr + slot, highest, mask=m_rows)
    tl.store(tile_total_ptr + slot, tl.sum(prob, 1), mask=m_rows)
    if STATS:
        tl.store(tile_moment_ptr + slot, tl.sum(tl.maximum(relative, LOG_FLOOR) * prob, 1), mask=m_rows)
        tl.store(tile_argmax_ptr + slot, (first_index + position).to(tl.int64), mask=m_rows)
    return rounded


@triton.jit
def row_starts(offset_ptr, rows, m_rows, stride):
    """Where each row begins, int64 in the shape of `rows`: that stride apart, or at offsets that are multiples of it,
    by which the compiler knows how they are aligned."""
    if offset_ptr is not None:
        return tl.load(offset_ptr + rows, mask=m_rows, other=0) // stride * stride
    else:
        return rows.to(tl.int64) * stride


@triton.jit(do_not_specialize=["seed", "vocab_start", "chunk_start", "num_rows"])
def weights_kernel(
    product_ptr,  # [T, C] h . w, float32 or the input's dtype; or the logits that are given, any dtype
    prob_ptr,  # [T, C] input dtype, out, may be the same memory; None: sums alone; with RAW: the scores, float32
    offset_ptr,  # [T] int64, where each row of logits begins, in elements; None: `stride_product_t` apart
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    noise_scale_ptr,  # [T]
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    bitmask_ptr,  # [T, W] int32
    peak_ptr,  # [T] float32, highest score of the chunks before
    tile_peak_ptr,  # [T, tiles] float32, out; the same for total, moment, argmax (int64)
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    group_max_ptr,  # [T, groups] float32, out: highest scores of groups of GROUP entries; None: not wanted
    num_rows,
    num_vocab,
    num_groups,
    stride_product_t,
    stride_product_v,
    stride_prob,
    stride_bias,
    stride_bitmask,
    vocab_start,
    chunk_start,  # the chunk's first row in this weight
    chunk_size,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    ALIGNED: tl.constexpr,
    FIRST: tl.constexpr,
    STATS: tl.constexpr,
    RAW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    num_tiles = tl.cdiv(chunk_size, BLOCK_V)
    i_tile = tl.program_id(0) % num_tiles
    rows = tl.program_id(0) // num_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_vocab = column < chunk_size
    inside = m_rows[:, None] & m_vocab[None, :]
    p_product = product_ptr + row_starts(offset_ptr, rows, m_rows, stride_product_t)[:, None]
    p_product += column.to(tl.int64)[None, :] * stride_product_v
    product = tl.load(p_product, mask=inside, other=0.0).to(tl.float32)
    row = row_options(
        temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
        rows[:, None], m_rows[:, None], seed, inverse_temperature, noise_scale,
    )  # fmt: skip
    call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)
    score, _, _ = scores(product, (chunk_start + column)[None, :], row, call, ALIGNED)
    p_prob = rows.to(tl.int64)[:, None] * stride_prob + column[None, :]
    if RAW:
        tl.store(prob_ptr + p_prob, score, mask=inside)
    else:
        dtype: tl.constexpr = tl.float32 if prob_ptr is None else prob_ptr.dtype.element_ty
        prob = store_sums(
            score, m_vocab, rows, m_rows, i_tile, num_tiles, chunk_start + i_tile * BLOCK_V,
            peak_ptr, tile_peak_ptr, tile_total_ptr, tile_moment_ptr, tile_argmax_ptr, group_max_ptr, num_groups,
            dtype, FIRST, STATS, GROUP,
        )  # fmt: skip
        if prob_ptr is not None:
            tl.store(prob_ptr + p_prob, prob, mask=inside)


@triton.jit(do_not_specialize=["number", "columns", "first"])
def add_entries_kernel(
    logits_ptr,  # [T, C] float32, in and out
    ids_ptr,  # [T, m] int64, in the whole vocabulary
    values_ptr,  # [T, m]
    number,  # m
    columns,  # C
    stride_logits,
    first,  # index of the first column in the whole vocabulary
    BLOCK: tl.constexpr,
):
    """logits[t, ids[t, j]] += values[t, j]. What one id has several times is added up in order, at its first place."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * number + entries, mask=entries < number, other=-1)
    total = tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, number, BLOCK):
        others = start + tl.arange(0, BLOCK)
        other_ids = tl.load(ids_ptr + row * number + others, mask=others < number, other=-1)
        values = tl.load(values_ptr + row * number + others, mask=others < number, other=0.0).to(tl.float32)
        same = ids[:, None] == other_ids[None, :]
        total += tl.sum(tl.where(same, values[None, :], 0.0), 1)
        before += tl.sum((same & (others[None, :] < entries[:, None])).to(tl.int32), 1)
    column = ids - first
    m_entries = (entries < number) & (before == 0) & (column >= 0) & (column < columns)
    p_logits = logits_ptr + row * stride_logits + column
    tl.store(p_logits, tl.load(p_logits, mask=m_entries) + total, mask=m_entries)


@triton.jit(do_not_specialize=["seed", "vocab_start", "chunk_start", "num_rows"])
def weights_product_kernel(
    peak_ptr,  # as for `weights_kernel`; first, because a launch takes its device from the first argument
    hidden_desc,  # [T, D] by tiles [BLOCK_T, BLOCK_K]
    weight_desc,  # [V, D] by tiles [BLOCK_V, BLOCK_K]
    prob_desc,  # [T, C] by tiles [BLOCK_T, BLOCK_V], out
    bias_ptr,
    temperature_ptr,
    noise_scale_ptr,
    seed_ptr,
    threshold_ptr,
    bitmask_ptr,
    tile_peak_ptr,
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    num_rows,
    num_vocab,
    width,
    stride_bias,
    stride_bitmask,
    vocab_start,
    chunk_start,
    chunk_size,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, BLOCK_T)
    num_tiles = tl.cdiv(chunk_size, BLOCK_V)
    # neighbours share a tile of W
    for i in tl.range(tl.program_id(0), row_tiles * num_tiles, tl.num_programs(0)):
        i_rows = i % row_tiles
        i_tile = i // row_tiles
        product = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for start in range(0, width, BLOCK_K):
            hidden = hidden_desc.load([i_rows * BLOCK_T, start])
            weight = weight_desc.load([chunk_start + i_tile * BLOCK_V, start])
            product = dot(hidden, tl.trans(weight), product, PRECISION)
        rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
        m_rows = rows < num_rows
        column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        row = row_options(
            temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
            rows[:, None], m_rows[:, None], seed, inverse_temperature, noise_scale,
        )  # fmt: skip
        call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)
        score, _, _ = scores(product, (chunk_start + column)[None, :], row, call, ALIGNED)
        prob = store_sums(
            score, column < chunk_size, rows, m_rows, i_tile, num_tiles, chunk_start + i_tile * BLOCK_V,
            peak_ptr, tile_peak_ptr, tile_total_ptr, tile_moment_ptr, tile_argmax_ptr, None, 0,
            prob_desc.dtype, FIRST, STATS, 1,
        )  # fmt: skip
        prob_desc.store([i_rows * BLOCK_T, i_tile * BLOCK_V], prob)


@triton.jit(do_not_specialize=["num_tiles", "parts"])
def settle_kernel(
    prob_ptr,  # [T, C], in and out
    acc_ptr,  # [T, E] float32, in and out
    tile_peak_ptr,  # [T, tiles] float32; the same for total, moment, argmax (int64)
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    old_peak_ptr,  # [T] float32, in: all parts of a row read it, so the new one goes elsewhere
    new_peak_ptr,  # [T] float32, out
    total_ptr,  # [T] float32, in and out; the same for moment, argmax (int64)
    moment_ptr,
    argmax_ptr,
    num_tiles,
    chunk_size,
    width,
    stride_prob,
    parts,  # programs of a row
    FIRST: tl.constexpr,
    STATS: tl.constexpr,
    TILE: tl.constexpr,  # columns of a tile
    TILES: tl.constexpr,  # power of two >= num_tiles
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    tiles = tl.arange(0, TILES)
    m_tiles = tiles < num_tiles
    slots = row * num_tiles + tiles
    if FIRST:
        old_peak = LOWEST
    else:
        old_peak = tl.load(old_peak_ptr + row)
    tile_peaks = tl.load(tile_peak_ptr + slots, mask=m_tiles, other=LOWEST)
    peak = tl.maximum(tl.max(tile_peaks, 0), old_peak)
    base = reference(peak)

    shifts = reference(tl.maximum(tile_peaks, old_peak)) - base
    per_part = tl.cdiv(num_tiles, parts)
    first = part * per_part
    last = tl.minimum(first + per_part, num_tiles)
    moved = tl.where((tiles >= first) & (tiles < last), shifts, 0.0) != 0.0
    if tl.max(moved.to(tl.int32), 0) > 0:
        for i_tile in range(first, last):
            shift = reference(tl.maximum(tl.load(tile_peak_ptr + row * num_tiles + i_tile), old_peak)) - base
            if shift != 0.0:
                column = i_tile * TILE + tl.arange(0, TILE)
                p_prob = prob_ptr + row * stride_prob + column
                prob = tl.load(p_prob, mask=column < chunk_size, other=0.0).to(tl.float32) * tl.exp(shift)
                tl.store(p_prob, prob.to(prob_ptr.dtype.element_ty), mask=column < chunk_size)
    if not FIRST:
        shift = reference(old_peak) - base
        if shift != 0.0:
            factor = tl.exp(shift)
            for start in range(part * BLOCK_E, width, parts * BLOCK_E):
                cols = start + tl.arange(0, BLOCK_E)
                p_acc = acc_ptr + row * width + cols
                tl.store(p_acc, tl.load(p_acc, mask=cols < width, other=0.0) * factor, mask=cols < width)

    if part == 0:
        decays = tl.where(m_tiles, tl.exp(shifts), 0.0)
        totals = tl.load(tile_total_ptr + slots, mask=m_tiles, other=0.0) * decays
        total = tl.sum(totals, 0)
        if not FIRST:
            old_shift = reference(old_peak) - base
            old_decay = tl.exp(old_shift)
            old_total = tl.load(total_ptr + row) * old_decay
            total += old_total
        tl.store(new_peak_ptr + row, peak)
        tl.store(total_ptr + row, total)
        if STATS:
            moments = tl.load(tile_moment_ptr + slots, mask=m_tiles, other=0.0) * decays
            moment = tl.sum(moments + tl.maximum(shifts, LOG_FLOOR) * totals, 0)
            indices = tl.load(tile_argmax_ptr + slots, mask=m_tiles, other=0)
            best = tl.min(tl.where(tile_peaks == peak, tiles, TILES), 0)  # the lowest index of a tie
            argmax = tl.sum(tl.where(tiles == best, indices, 0), 0)
            if not FIRST:
                moment += tl.load(moment_ptr + row) * old_decay + tl.maximum(old_shift, LOG_FLOOR) * old_total
                argmax = tl.where(peak > old_peak, argmax, tl.load(argmax_ptr + row))
            tl.store(moment_ptr + row, moment)
            tl.store(argmax_ptr + row, argmax)


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    acc_ptr,  # [T, E] float32
    peak_ptr,  # [T] float32 highest score; below, the sums relative to its reference
    total_ptr,  # [T] float32
    moment_ptr,  # [T] float32
    out_ptr,  # [T, E] any dtype, out; may be the same memory as acc
    exact_ptr,  # [T, E] float32, out; may be the same memory as acc; None: not wanted
    new_peak_ptr,  # [T] float32, out; None: not wanted; the same below
    new_total_ptr,
    lse_ptr,
    entropy_ptr,  # the moment where FINISH is False
    max_prob_ptr,
    width,
    embed_scale,
    FINISH: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The result and its statistics, relative to the peak. FINISH = False (a vocabulary shard, still to be merged with
    the others): `out` is the sum and is not divided, and the moment stays a moment."""
    row = tl.program_id(0).to(tl.int64)
    i_cols = tl.program_id(1)
    cols = i_cols * BLOCK_E + tl.arange(0, BLOCK_E)
    m_cols = cols < width
    peak = tl.load(peak_ptr + row)
    shift = reference(peak) - peak
    total = tl.load(total_ptr + row)
    decay = tl.exp(shift)
    factor = embed_scale / total if FINISH else decay
    acc = tl.load(acc_ptr + row * width + cols, mask=m_cols, other=0.0) * factor
    if exact_ptr is not None:
        tl.store(exact_ptr + row * width + cols, acc, mask=m_cols)
    tl.store(out_ptr + row * width + cols, acc.to(out_ptr.dtype.element_ty), mask=m_cols)
    if i_cols == 0:
        log_total = tl.log(total)
        if new_peak_ptr is not None:
            tl.store(new_peak_ptr + row, peak)
            tl.store(new_total_ptr + row, total * decay)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, peak + (log_total + shift))
        if entropy_ptr is not None:
            moment = tl.load(moment_ptr + row)
            if FINISH:
                tl.store(entropy_ptr + row, log_total - moment / total)
            else:
                tl.store(entropy_ptr + row, (moment + shift * total) * decay)
            tl.store(max_prob_ptr + row, 1.0 / (total * decay))
