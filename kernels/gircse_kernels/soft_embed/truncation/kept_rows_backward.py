"""Gradients of soft tokens of rows that keep few entries; `kept_rows` has the formulas and reads the lists."""

# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from ...scores import LOG_FLOOR, row_options
from ..many_rows import row_starts
from .kept_rows import dots, length, part_of_row


@triton.jit
def part_gradient(part, numbers, upstream, row, call, embed_scale, BLOCK: tl.constexpr):
    """Of entries of `part_of_row`: dS, dX, dS's factors for temperature and noise scale, and what multiplies g in dE.

    Args:
        numbers: the row's peak, sum, constant (of `constants_kernel`), slope and token (-1: a soft row).
        upstream: E and its strides, pointer to g and its stride (None: zero), and its width.
    """
    vocab, kept, score, noise, value = part
    peak, total, constant, slope, token = numbers
    values_ptr, stride_v, stride_e, grad_ptr, stride_grad, width = upstream
    inverse, noise_scales = row[0], row[1]
    vocab_start, scale, softcap = call[5], call[7], call[8]
    relative = score - peak
    prob = tl.exp(relative) / total
    grad = tl.zeros(vocab.shape, tl.float32) - constant
    if grad_ptr is not None:
        grad += embed_scale * dots(values_ptr, stride_v, stride_e, vocab, kept, grad_ptr, stride_grad, width, BLOCK)
    grad = (grad - tl.maximum(relative, LOG_FLOOR) * slope) * prob
    # no entry is kept of a row that is NaN: so is its gradient
    nothing = tl.where(total > 0.0, 0.0, float("nan"))
    grad = tl.where(kept, grad, nothing)
    without_noise = tl.maximum(relative - noise * noise_scales, LOG_FLOOR)
    if softcap is not None:
        # the capped logit is the score without the value that was added behind the soft-cap
        capped = (without_noise + peak - value * inverse) / (softcap * inverse)
        product_grad = tl.where(kept, grad * (1.0 - capped * capped) * (scale * softcap * inverse), nothing)
    else:
        product_grad = grad * (scale * inverse)
    chosen = tl.where(token < 0, prob, tl.where(token == vocab + vocab_start, 1.0, 0.0))
    return grad, product_grad, without_noise, tl.where(kept, chosen * embed_scale, 0.0)


@triton.jit
def row_numbers_of(peak_ptr, total_ptr, constant_ptr, slope_ptr, token_ptr, row):
    """`numbers` of `part_gradient`."""
    slope = 0.0
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + row).to(tl.float32)
    token = tl.full([], -1, tl.int64)
    if token_ptr is not None:
        token = tl.load(token_ptr + row)
    return tl.load(peak_ptr + row), tl.load(total_ptr + row), tl.load(constant_ptr + row), slope, token


@triton.jit(do_not_specialize=["seed", "vocab_start", "num_entries"])
def kept_backward_kernel(
    ids_ptr,  # these as in `kept_forward_kernel`
    scores_ptr,
    count_ptr,
    values_ptr,
    hidden_ptr,
    offset_ptr,
    head_ptr,
    entry_ids_ptr,
    entries_ptr,
    bias_ptr,
    temperature_ptr,
    noise_scale_ptr,
    seed_ptr,
    threshold_ptr,
    bitmask_ptr,
    grad_ptr,  # [T, E] upstream gradient; None: zero
    peak_ptr,  # [T]
    total_ptr,  # [T]
    constant_ptr,  # [T], of `constants_kernel`
    slope_ptr,  # [T]; None: zero
    token_ptr,  # [T] int64, as for `score_grad_kernel`
    score_grad_ptr,  # [T, C] float32, out: gradient of h w + bias of the listed entries; None: not wanted
    prob_ptr,  # [T, C] float32, out: embed_scale * P, of a hard row one-hot; None: not wanted
    grad_hidden_ptr,  # [T, D] float32, out, or [T, V] in the logits' dtype, zero before; None: not wanted
    grad_temperature_ptr,  # [T] float32, out: sum of dS (s without noise - peak); None: not wanted
    grad_noise_ptr,  # [T] float32, out: sum of dS noise; None: not wanted
    grad_entries_ptr,  # [T, m] float32, out, zero before; None: not wanted
    num_vocab,
    value_width,
    width,
    num_entries,
    stride_values_v,
    stride_values_e,
    stride_hidden_t,
    stride_hidden_d,
    stride_head_v,
    stride_head_d,
    stride_grad_t,
    stride_grad_e,
    stride_bias,
    stride_bitmask,
    vocab_start,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    embed_scale,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row = row_options(
        temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
        i_row, True, seed, inverse_temperature, noise_scale,
    )  # fmt: skip
    call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)
    source = (
        hidden_ptr, offset_ptr, stride_hidden_t, stride_hidden_d, head_ptr, stride_head_v, stride_head_d, width,
        entry_ids_ptr, entries_ptr, num_entries,
    )  # fmt: skip
    lists = (ids_ptr, scores_ptr, COUNT)
    overflows = tl.load(count_ptr + i_row) >= COUNT
    end = tl.where(overflows, num_vocab, tl.maximum(length(scores_ptr + i_row * COUNT, COUNT), 1))
    inverse = row[0]
    numbers = row_numbers_of(peak_ptr, total_ptr, constant_ptr, slope_ptr, token_ptr, i_row)
    upstream = (
        values_ptr, stride_values_v, stride_values_e,
        None if grad_ptr is None else grad_ptr + i_row * stride_grad_t, stride_grad_e, value_width,
    )  # fmt: skip

    grad_temperature = tl.zeros([], tl.float32)
    grad_noise = tl.zeros([], tl.float32)
    for start in range(0, end, BLOCK_C):
        part = part_of_row(i_row, start, overflows, lists, source, row, call, BLOCK_C, BLOCK_E)
        vocab, kept, noise = part[0], part[1], part[3]
        grad, product_grad, without_noise, chosen = part_gradient(
            part, numbers, upstream, row, call, embed_scale, BLOCK_E
        )
        grad_temperature += tl.sum(grad * without_noise, 0)
        grad_noise += tl.sum(grad * noise, 0)
        slots = i_row * COUNT + start + tl.arange(0, BLOCK_C)
        if score_grad_ptr is not None:
            tl.store(score_grad_ptr + slots, product_grad, mask=kept & ~overflows)
        if prob_ptr is not None:
            tl.store(prob_ptr + slots, chosen, mask=kept & ~overflows)
        if start > 0:
            tl.debug_barrier()  # sums over the parts of a long row are in memory
        if grad_entries_ptr is not None:
            for first in range(0, num_entries, 32):
                entries = first + tl.arange(0, 32)
                m_entries = entries < num_entries
                ids = tl.load(entry_ids_ptr + i_row * num_entries + entries, mask=m_entries, other=-1)
                found = tl.where((vocab + vocab_start)[:, None] == ids[None, :], (grad * inverse)[:, None], 0.0)
                p_entries = grad_entries_ptr + i_row * num_entries + entries
                tl.store(p_entries, tl.load(p_entries, mask=m_entries) + tl.sum(found, 0), mask=m_entries)
        if grad_hidden_ptr is not None:
            if head_ptr is None:
                p_grad = grad_hidden_ptr + i_row * num_vocab + vocab
                tl.store(p_grad, product_grad.to(grad_hidden_ptr.dtype.element_ty), mask=kept)
            else:
                for first in tl.range(0, width, BLOCK_E, num_stages=3):
                    cols = first + tl.arange(0, BLOCK_E)
                    m_cols = cols < width
                    p_head = head_ptr + vocab[:, None] * stride_head_v + cols.to(tl.int64)[None, :] * stride_head_d
                    head = tl.load(p_head, mask=kept[:, None] & m_cols[None, :], other=0.0).to(tl.float32)
                    added = tl.sum(product_grad[:, None] * head, 0)
                    p_grad = grad_hidden_ptr + i_row * width + cols
                    if start > 0:
                        added += tl.load(p_grad, mask=m_cols, other=0.0)
                    tl.store(p_grad, added, mask=m_cols)
    if grad_temperature_ptr is not None:
        tl.store(grad_temperature_ptr + i_row, grad_temperature)
    if grad_noise_ptr is not None:
        tl.store(grad_noise_ptr + i_row, grad_noise)


@triton.jit(do_not_specialize=["num_places"])
def kept_matrix_kernel(
    sorted_ptr,  # [T C] int64, ids of all lists in ascending order; V or more: not kept
    order_ptr,  # [T C] int64, where each of them was
    weight_ptr,  # [T, C] float32
    rows_ptr,  # [T, D] any dtype
    weight2_ptr,  # [T, C] float32; None: no second sum, of a tied matrix
    rows2_ptr,  # [T, D] any dtype
    grad_ptr,  # [V, D] out, zero before: sum of weight row; None: not wanted
    grad_bias_ptr,  # [V] float32, out, zero before: sum of the weights; None: not wanted
    num_places,
    num_vocab,
    width,
    stride_rows_t,
    stride_rows_d,
    stride_rows2_t,
    stride_rows2_d,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The program at the first place of an id owns its row of the result."""
    place = tl.program_id(0)
    cols = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    m_cols = cols < width
    index = tl.load(sorted_ptr + place)
    if (index < num_vocab) & (tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1) != index):
        acc = tl.zeros([BLOCK_E], tl.float32)
        total = tl.zeros([], tl.float32)
        more = True
        while more:
            slots = place + tl.arange(0, BLOCK_C)
            same = tl.load(sorted_ptr + slots, mask=slots < num_places, other=-1) == index
            source = tl.load(order_ptr + slots, mask=same, other=0)
            row = (source // COUNT)[:, None]
            m_rows = same[:, None] & m_cols[None, :]
            weight = tl.load(weight_ptr + source, mask=same, other=0.0)
            total += tl.sum(weight, 0)
            if grad_ptr is not None:
                p_rows = rows_ptr + row * stride_rows_t + cols[None, :] * stride_rows_d
                rows = tl.load(p_rows, mask=m_rows, other=0.0).to(tl.float32)
                acc += tl.sum(weight[:, None] * rows, 0)
            if weight2_ptr is not None:
                weight = tl.load(weight2_ptr + source, mask=same, other=0.0)
                rows = tl.load(
                    rows2_ptr + row * stride_rows2_t + cols[None, :] * stride_rows2_d, mask=m_rows, other=0.0
                )
                acc += tl.sum(weight[:, None] * rows.to(tl.float32), 0)
            more = tl.sum(same.to(tl.int32), 0) == BLOCK_C
            place += BLOCK_C
        if grad_ptr is not None:
            tl.store(grad_ptr + index * width + cols, acc.to(grad_ptr.dtype.element_ty), mask=m_cols)
        if grad_bias_ptr is not None and tl.program_id(1) == 0:
            tl.store(grad_bias_ptr + index, total)


@triton.jit
def add_outer(grad_ptr, vocab, weight, vector_ptr, stride, width, m_vocab, BLOCK: tl.constexpr):
    """Rows of a gradient [V, width] += weight [C] times one vector."""
    for start in range(0, width, BLOCK):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        m_cols = cols < width
        vector = tl.load(vector_ptr + cols * stride, mask=m_cols, other=0.0).to(tl.float32)
        p_grad = grad_ptr + vocab[:, None] * width + cols[None, :]
        inside = m_vocab[:, None] & m_cols[None, :]
        grad = tl.load(p_grad, mask=inside, other=0.0).to(tl.float32) + weight[:, None] * vector[None, :]
        tl.store(p_grad, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "vocab_start", "num_entries"])
def overflow_matrix_kernel(
    ids_ptr,  # these as in `kept_forward_kernel`
    scores_ptr,
    count_ptr,
    values_ptr,
    hidden_ptr,
    offset_ptr,
    head_ptr,
    entry_ids_ptr,
    entries_ptr,
    bias_ptr,
    temperature_ptr,
    noise_scale_ptr,
    seed_ptr,
    threshold_ptr,
    bitmask_ptr,
    grad_ptr,  # [T, E] upstream gradient; None: zero
    peak_ptr,  # [T]
    total_ptr,  # [T]
    constant_ptr,  # [T], of `constants_kernel`
    slope_ptr,  # [T]; None: zero
    token_ptr,  # [T] int64, as for `score_grad_kernel`
    grad_head_ptr,  # [V, D], in and out; None: not wanted; the same below. A tied matrix gets both sums here
    grad_values_ptr,  # [V, E]
    grad_bias_ptr,  # [V] float32
    num_rows,
    num_vocab,
    value_width,
    width,
    num_entries,
    stride_values_v,
    stride_values_e,
    stride_hidden_t,
    stride_hidden_d,
    stride_head_v,
    stride_head_d,
    stride_grad_t,
    stride_grad_e,
    stride_bias,
    stride_bitmask,
    vocab_start,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    embed_scale,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What rows that overflow add to the gradients of the matrices: a program for each block of vocabulary entries."""
    start = tl.program_id(0) * BLOCK_C
    source = (
        hidden_ptr, offset_ptr, stride_hidden_t, stride_hidden_d, head_ptr, stride_head_v, stride_head_d, width,
        entry_ids_ptr, entries_ptr, num_entries,
    )  # fmt: skip
    lists = (ids_ptr, scores_ptr, COUNT)
    call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)
    for first in range(0, num_rows, 128):
        block = first + tl.arange(0, 128)
        counts = tl.load(count_ptr + block, mask=block < num_rows, other=0)
        if tl.max(counts, 0) >= COUNT:
            for number in range(first, tl.minimum(first + 128, num_rows)):
                i_row = tl.cast(number, tl.int64)
                if tl.load(count_ptr + i_row) >= COUNT:
                    row = row_options(
                        temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
                        i_row, True, seed, inverse_temperature, noise_scale,
                    )  # fmt: skip
                    part = part_of_row(i_row, start, True, lists, source, row, call, BLOCK_C, BLOCK_E)
                    numbers = row_numbers_of(peak_ptr, total_ptr, constant_ptr, slope_ptr, token_ptr, i_row)
                    upstream = (
                        values_ptr, stride_values_v, stride_values_e,
                        None if grad_ptr is None else grad_ptr + i_row * stride_grad_t, stride_grad_e, value_width,
                    )  # fmt: skip
                    vocab, kept = part[0], part[1]
                    found = part_gradient(part, numbers, upstream, row, call, embed_scale, BLOCK_E)
                    product_grad, chosen = found[1], found[3]
                    tl.debug_barrier()  # sums over the rows are in memory
                    if grad_head_ptr is not None:
                        vector = hidden_ptr + row_starts(offset_ptr, i_row, True, stride_hidden_t)
                        add_outer(grad_head_ptr, vocab, product_grad, vector, stride_hidden_d, width, kept, BLOCK_E)
                    if grad_values_ptr is not None:
                        tl.debug_barrier()  # it may be the same matrix
                        vector = grad_ptr + i_row * stride_grad_t
                        add_outer(grad_values_ptr, vocab, chosen, vector, stride_grad_e, value_width, kept, BLOCK_E)
                    if grad_bias_ptr is not None:
                        before = tl.load(grad_bias_ptr + vocab, mask=kept, other=0.0)
                        tl.store(grad_bias_ptr + vocab, before + product_grad, mask=kept)
