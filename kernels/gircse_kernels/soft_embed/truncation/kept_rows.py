"""Soft tokens of rows that keep few entries, from lists of them: C entries of E and of W for each row, nothing else.

    forward    s_c = score_c + noise_scale gumbel(id_c);  P = softmax(s);  out = embed_scale sum_c P_c E[id_c]
    backward   dP_c = embed_scale g . E[id_c];  dS = P (dP - constant - slope (s - peak));  dh = sum_c dX_c W[id_c]
    matrices   dW[v] = sum of dX h, dE[v] = sum of P g over all places where v is listed: a program for each v

dX is the gradient of h w + bias, as in `gradients`, from where the constant comes as well. The lists are `selection`'s.

A row that overflows has no list: a tie goes on beyond C entries. The same programs then walk all V entries with the
row's threshold and make the scores again. That is slow and right, and costs nothing where no row overflows.
"""

# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from ...scores import LOG_FLOOR, LOWEST, gumbel_noise, row_options, scores
from ..many_rows import row_starts


@triton.jit
def dots(matrix_ptr, stride_v, stride_d, vocab, m_vocab, vector_ptr, stride, width, BLOCK: tl.constexpr):
    """Products of rows of a matrix with one vector, float32."""
    products = tl.zeros(vocab.shape, tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=3):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        m_cols = cols < width
        vector = tl.load(vector_ptr + cols * stride, mask=m_cols, other=0.0).to(tl.float32)
        p_matrix = matrix_ptr + vocab[:, None] * stride_v + cols[None, :] * stride_d
        matrix = tl.load(p_matrix, mask=m_vocab[:, None] & m_cols[None, :], other=0.0).to(tl.float32)
        products += tl.sum(matrix * vector[None, :], 1)
    return products


@triton.jit
def entry_values(ids_ptr, values_ptr, num_entries, vocab, BLOCK: tl.constexpr):
    """What a row's `bias_ids` add to the logits of vocabulary entries (indices of the whole vocabulary)."""
    total = tl.zeros(vocab.shape, tl.float32)
    for start in range(0, num_entries, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + entries, mask=entries < num_entries, other=-1)
        values = tl.load(values_ptr + entries, mask=entries < num_entries, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(vocab[:, None] == ids[None, :], values[None, :], 0.0), 1)
    return total


@triton.jit
def part_of_row(i_row, start, overflows, lists, source, row, call, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Entries `start` to `start + BLOCK_C - 1` of a row's list, or of the vocabulary where the row overflows.

    -> index, whether it is kept, score with noise (-inf: not kept), noise, and the value of `bias_ids`.

    Args:
        lists: ids, scores and C.
        source: hidden states, or the logits where there is no head, their offsets and strides; head, its strides and D;
            `bias_ids`, `bias_values` and their number.
        row, call: as for `scores`.
    """
    ids_ptr, scores_ptr, num_listed = lists
    (
        hidden_ptr, offset_ptr, stride_t, stride_hidden, head_ptr, stride_v, stride_d, width,
        entry_ids_ptr, entries_ptr, num_entries,
    ) = source  # fmt: skip
    inverse, noise_scales, seeds, thresholds = row[0], row[1], row[2], row[3]
    bias_ptr, _threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap = call
    slots = start + tl.arange(0, BLOCK_C)
    vocab = slots.to(tl.int64)
    there = slots < num_listed
    if overflows:
        there = slots < num_vocab
    else:
        vocab = tl.load(ids_ptr + i_row * num_listed + slots, mask=there, other=0)
    value = tl.zeros([BLOCK_C], tl.float32)
    if entry_ids_ptr is not None:
        first = i_row * num_entries
        value = entry_values(entry_ids_ptr + first, entries_ptr + first, num_entries, vocab + vocab_start, 32)
    if overflows:
        p_hidden = hidden_ptr + row_starts(offset_ptr, i_row, True, stride_t)
        if head_ptr is None:
            product = tl.load(p_hidden + vocab * stride_hidden, mask=there, other=0.0).to(tl.float32)
        else:
            product = dots(head_ptr, stride_v, stride_d, vocab, there, p_hidden, stride_hidden, width, BLOCK_D)
        noiseless = (bias_ptr, None, bitmask_ptr, stride_bias, num_vocab, vocab_start, None, scale, softcap)
        score, _capped, _noise = scores(product, vocab, row, noiseless, False)
        score += value * inverse
        score = tl.where(score < thresholds, float("-inf"), score)
    else:
        score = tl.load(scores_ptr + i_row * num_listed + slots, mask=there, other=float("-inf"))
    noise = tl.zeros([BLOCK_C], tl.float32)
    if seed is not None:
        noise = gumbel_noise(seeds, vocab + vocab_start, False)
    score = tl.where(there, score + noise * noise_scales, float("-inf"))
    return vocab, score != float("-inf"), score, noise, value


@triton.jit
def length(scores_ptr, COUNT: tl.constexpr):
    """Up to where a row's list has entries that are kept. Other shards' entries may lie between."""
    slots = tl.arange(0, COUNT)
    score = tl.load(scores_ptr + slots)
    return tl.max(tl.where(score == float("-inf"), 0, slots + 1), 0)  # NaN counts


@triton.jit(do_not_specialize=["seed", "vocab_start", "num_entries"])
def kept_forward_kernel(
    ids_ptr,  # [T, C] int64
    scores_ptr,  # [T, C] float32, without noise; -inf: not kept
    count_ptr,  # [T] int64; C or more: the row overflows
    values_ptr,  # [V, E]
    hidden_ptr,  # [T, D], or logits; this and what follows up to the results is read where a row overflows
    offset_ptr,  # as for `weights_kernel`
    head_ptr,  # [V, D]; None: logits are given
    entry_ids_ptr,  # [T, m] int64; None: no `bias_ids`
    entries_ptr,  # [T, m]
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    noise_scale_ptr,  # [T], always read, as the seed
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    bitmask_ptr,  # [T, W] int32
    out_ptr,  # [T, E] any dtype, out; the rest as in `merge_kernel`
    exact_ptr,
    peak_ptr,
    total_ptr,
    lse_ptr,
    entropy_ptr,
    max_prob_ptr,
    argmax_ptr,
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
    stride_bias,
    stride_bitmask,
    vocab_start,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    embed_scale,
    FINISH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_cols = cols < value_width
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
    end = tl.where(overflows, num_vocab, length(scores_ptr + i_row * COUNT, COUNT))

    peak = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    moment = tl.zeros([], tl.float32)
    argmax = tl.zeros([], tl.int64)
    acc = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, end, BLOCK_C):
        part = part_of_row(i_row, start, overflows, lists, source, row, call, BLOCK_C, BLOCK_E)
        vocab, kept, score = part[0], part[1], part[2]
        p_values = values_ptr + vocab[:, None] * stride_values_v + cols.to(tl.int64)[None, :] * stride_values_e
        values = tl.load(p_values, mask=kept[:, None] & m_cols[None, :], other=0.0).to(tl.float32)
        highest = tl.maximum(tl.max(score, 0), LOWEST)
        first = tl.min(tl.where(score == highest, tl.arange(0, BLOCK_C), BLOCK_C), 0)
        index = tl.sum(tl.where(tl.arange(0, BLOCK_C) == first, vocab, 0), 0)
        argmax = tl.where(highest > peak, index, argmax)
        new_peak = tl.maximum(peak, highest)
        shift = peak - new_peak
        decay = tl.exp(shift)
        relative = score - new_peak
        prob = tl.exp(relative)
        moment = (moment + tl.maximum(shift, LOG_FLOOR) * total) * decay
        moment += tl.sum(tl.maximum(relative, LOG_FLOOR) * prob, 0)
        total = total * decay + tl.sum(prob, 0)
        acc = acc * decay + tl.sum(prob[:, None] * values, 0)
        peak = new_peak

    out = acc * (embed_scale / total if FINISH else 1.0)
    if exact_ptr is not None:
        tl.store(exact_ptr + i_row * value_width + cols, out, mask=m_cols)
    tl.store(out_ptr + i_row * value_width + cols, out.to(out_ptr.dtype.element_ty), mask=m_cols)
    if tl.program_id(1) == 0:
        log_total = tl.log(total)
        if peak_ptr is not None:
            tl.store(peak_ptr + i_row, peak)
            tl.store(total_ptr + i_row, total)
        if lse_ptr is not None:
            tl.store(lse_ptr + i_row, peak + log_total)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + i_row, log_total - moment / total if FINISH else moment)
            tl.store(max_prob_ptr + i_row, 1.0 / total)
            tl.store(argmax_ptr + i_row, argmax)
