"""Which entries top-k, top-p, min-p and top-n keep of each row, from scores that are in memory: one program for a row.

`weights_kernel` has read all scores and left, beside the tiles' sums, the maxima of groups of GROUP entries. The C
highest scores of a row lie in the C groups of highest maximum (of a tie those of lower index), because each of these
groups holds an entry that no entry of another group precedes. `select_kernel` therefore

    brackets the C-th largest maximum until at most 2 C groups are above       in registers, counts alone
    reads these groups, and writes the entries above the same bound to a list  C < entries <= LIST; else another bound
    sorts the list by (score, id), takes the first C, and applies the rules    a cumulative sum of C terms

Nothing here is a search over the vocabulary, and nothing but groups of at most 2 C * GROUP entries is read again.

A row that keeps C entries or more, by a tie at the k-th place, *overflows*, and so does every row where no capacity is
given (C = 0). Its threshold is found over all V entries by `threshold.row_threshold`, or for top-p alone, where C = 0,
from what `narrowing` has listed.
"""

import triton
import triton.language as tl

from ...scores import LOG_FLOOR, LOWEST, reference, row_options
from ..many_rows import row_starts
from .narrowing import listed_threshold
from .threshold import BOTTOM, BY_VALUE, NEAR, halfway, key_score, middle, ordered_key, row_scores, row_threshold

NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def place(reached, certain, offset, certain_offset):
    """Where the entries of a vector that reach a bound go in a list: those that are certain from `certain_offset` on,
    the others from `offset` on, in order. -> positions, and how many there are of both. At most 65,535 entries."""
    both = certain.to(tl.int32) * 65536 + (reached & ~certain).to(tl.int32)
    so_far = tl.cumsum(both, 0)
    total = tl.sum(both, 0)
    positions = tl.where(certain, certain_offset + (so_far >> 16), offset + (so_far & 0xFFFF)) - 1
    return positions, total >> 16, total & 0xFFFF


@triton.jit
def best_groups(maxima, m_groups, peak, num_groups, list_ptr, FEWEST: tl.constexpr):
    """Writes the FEWEST groups of highest maximum, and at most as many more, to a list in ascending order.

    -> how many, and the int64 key that their maxima reach, which FEWEST entries then reach, too.
    """
    keys = tl.where(m_groups, ordered_key(maxima), -(2**31))
    lowest = tl.min(tl.where(m_groups, maxima, float("inf")), 0)
    start = ordered_key(tl.maximum(lowest, peak - NEAR)).to(tl.int64)
    count = tl.sum((keys >= start).to(tl.int32), 0)
    enough = count >= FEWEST
    high = tl.where(enough, ordered_key(peak).to(tl.int64) + 1, start)
    low = tl.where(enough, start, tl.full([], BOTTOM, tl.int64))
    count = tl.where(enough, count, num_groups)
    step = tl.where(enough, 0, BY_VALUE)
    while (count > 2 * FEWEST) & (high - low > 1):
        key = middle(low, high, step)
        reached = tl.sum((keys >= key).to(tl.int32), 0)
        enough = reached >= FEWEST
        low = tl.where(enough, key, low)
        high = tl.where(enough, high, key)
        count = tl.where(enough, reached, count)
        step += 1
    certain = keys >= high
    num_certain = tl.sum(certain.to(tl.int32), 0)
    reached = keys >= low
    if count > 2 * FEWEST:  # one key: the first groups of the tie
        rank = tl.cumsum((reached & ~certain).to(tl.int32), 0)
        reached = certain | (reached & (rank <= 2 * FEWEST - num_certain))
        count = num_certain + tl.minimum(count - num_certain, 2 * FEWEST - num_certain)
    positions = tl.cumsum(reached.to(tl.int32), 0) - 1
    tl.store(list_ptr + positions, tl.arange(0, maxima.shape[0]), mask=reached)
    return count, low


@triton.jit
def collect(
    reader, num_vocab, low, high, groups_ptr, num_groups, scores_ptr, ids_ptr, FEWEST: tl.constexpr, LIST: tl.constexpr,
    GROUP: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Writes the entries of the listed groups that reach `low` to a list: those that reach `high`, fewer than FEWEST,
    to its beginning, the others behind FEWEST, as far as there is room. -> how many there are of both."""
    num_certain, num_others = 0, 0
    tl.debug_barrier()  # what other threads wrote to the lists
    for start in range(0, num_groups, WALK):
        slots = start + tl.arange(0, WALK)
        m_slots = slots < num_groups
        group = tl.load(groups_ptr + slots, mask=m_slots, other=0)
        vocab = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        score = tl.reshape(row_scores(reader, vocab, num_vocab, m_slots[:, None]), [WALK * GROUP])
        key = ordered_key(score)
        certain = key >= high
        positions, new_certain, new_others = place(key >= low, certain, FEWEST + num_others, num_certain)
        m_list = (key >= low) & (positions < tl.where(certain, FEWEST, LIST))
        tl.store(scores_ptr + positions, score, mask=m_list)
        tl.store(ids_ptr + positions, tl.reshape(vocab, [WALK * GROUP]), mask=m_list)
        num_certain += new_certain
        num_others += new_others
    tl.debug_barrier()
    return num_certain, num_others


@triton.jit
def highest_entries(
    reader, num_vocab, maxima, m_groups, peak, num_groups, groups_ptr, scores_ptr, ids_ptr, COUNT: tl.constexpr,
    LIST: tl.constexpr, GROUP: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """The COUNT highest scores of a row above -inf, in descending order, of a tie the lower index first, and their
    indices; behind them -inf and 0."""
    listed, low = best_groups(maxima, m_groups, peak, num_groups, groups_ptr, COUNT)
    high = ordered_key(peak).to(tl.int64) + 1
    key = low
    step, searching = 0, True
    num_certain, num_others = 0, 0
    while searching:
        num_certain, num_others = collect(
            reader, num_vocab, key, high, groups_ptr, listed, scores_ptr, ids_ptr, COUNT, LIST, GROUP, WALK
        )
        too_few = (num_certain + num_others < COUNT) & (key > low)
        high = tl.where(too_few, key, high)
        low = tl.where(too_few, low, key)
        searching = too_few | ((num_others > LIST - COUNT) & (high - key > 1))
        key = tl.where(high - low > 1, middle(low, high, step), low)
        step += 1
    slots = tl.arange(0, LIST)
    filled = (slots < num_certain) | ((slots >= COUNT) & (slots < COUNT + num_others))
    score = tl.load(scores_ptr + slots, mask=filled, other=0.0)
    index = tl.load(ids_ptr + slots, mask=filled, other=0)
    ordered = (ordered_key(score).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    best = tl.topk(tl.where(filled, ordered, NO_KEY), COUNT)
    found = best != NO_KEY
    score = tl.where(found, key_score((best >> 32).to(tl.int32)), float("-inf"))
    return score, tl.where(found, 0x7FFFFFFF - (best & 0x7FFFFFFF), 0)


@triton.jit
def nth(values, number):
    """The `number`-th value of a vector, counted from 1; -inf for 0 and beyond the last."""
    return tl.max(tl.where(tl.arange(0, values.shape[0]) == number.to(tl.int32) - 1, values, float("-inf")), 0)


@triton.jit
def row_rule(rule_ptr, row, most):
    """A float32 number of this row, at most `most`; that where rows have none."""
    if rule_ptr is None:
        return tl.cast(most, tl.float32)
    else:
        return tl.minimum(tl.load(rule_ptr + row), most).to(tl.float32)


@triton.jit
def apply_rules(score, peak, total, top_k, top_p, min_p, top_n, LIMIT: tl.constexpr, COUNT: tl.constexpr):
    """How many of the COUNT highest scores, which are in descending order, all rules keep, and how many the rule that
    limits their number does: top-k with LIMIT, else top-n. COUNT or more: a tie goes on beyond them."""
    found = score > float("-inf")
    kept = found
    if LIMIT:
        kept = found & (score >= nth(score, tl.minimum(top_k, COUNT)))
        limited = tl.sum(kept.to(tl.int32), 0)
    else:
        limited = tl.sum((found & (score >= nth(score, tl.minimum(top_n, COUNT)))).to(tl.int32), 0)
    weight = tl.where(kept, tl.exp(score - peak), 0.0)
    so_far = tl.cumsum(weight, 0)
    if LIMIT:
        total = tl.max(so_far, 0)
    reached = kept & (so_far - weight < top_p * total)
    kept = kept & (score >= nth(score, tl.sum(reached.to(tl.int32), 0)))
    kept = kept & (score >= peak + tl.log(min_p))
    kept = kept & (score >= nth(score, tl.minimum(top_n, COUNT)))
    return tl.sum(kept.to(tl.int32), 0), limited


@triton.jit
def row_sums(tile_peak_ptr, tile_total_ptr, tile_moment_ptr, tile_argmax_ptr, row, num_tiles, TILES: tl.constexpr):
    """Of the tiles' sums, which `weights_kernel` left: highest score, sum, moment and argmax of the row."""
    tiles = tl.arange(0, TILES)
    m_tiles = tiles < num_tiles
    slots = row * num_tiles + tiles
    peaks = tl.load(tile_peak_ptr + slots, mask=m_tiles, other=LOWEST)
    peak = tl.max(peaks, 0)
    shifts = reference(peaks) - peak
    decays = tl.where(m_tiles, tl.exp(shifts), 0.0)
    totals = tl.load(tile_total_ptr + slots, mask=m_tiles, other=0.0) * decays
    moments = tl.load(tile_moment_ptr + slots, mask=m_tiles, other=0.0) * decays
    moment = tl.sum(moments + tl.maximum(shifts, LOG_FLOOR) * totals, 0)
    best = tl.min(tl.where(peaks == peak, tiles, TILES), 0)  # the lowest index of a tie
    argmax = tl.sum(tl.where(tiles == best, tl.load(tile_argmax_ptr + slots, mask=m_tiles, other=0), 0), 0)
    return peak, tl.sum(totals, 0), moment, argmax


@triton.jit(do_not_specialize=["vocab_start", "num_tiles", "num_groups", "num_parts"])
def select_kernel(
    product_ptr,  # [T, V] h . w, float32; or the logits that are given, any dtype
    offset_ptr,  # [T] int64, as for `weights_kernel`
    group_max_ptr,  # [T, groups] float32
    tile_peak_ptr,  # [T, tiles] float32, sums relative to their reference; the same for total, moment, argmax (int64)
    tile_total_ptr,
    tile_moment_ptr,
    tile_argmax_ptr,
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    bitmask_ptr,  # [T, W] int32
    top_k_ptr,  # [T] int64; None: no such rule, as for the next three
    top_p_ptr,  # [T] float32
    min_p_ptr,  # [T] float32
    top_n_ptr,  # [T] int64
    list_ptr,  # [T, ROOM] float32, scratch
    index_ptr,  # [T, 2 ROOM] int32, scratch
    key_ptr,  # of `narrow_kernel`: keys and masses of its last pass, lists, numbers and edges; None: it has not run
    mass_ptr,
    part_list_ptr,
    number_ptr,
    edge_ptr,
    threshold_ptr,  # [T] float32, out; None: without rules, all COUNT are kept
    first_ptr,  # [T] float32, out: log-sum-exp, entropy, largest probability; without FINISH peak, total, moment
    second_ptr,
    third_ptr,
    argmax_ptr,  # [T] int64, out
    ids_ptr,  # [T, COUNT] int64, out
    scores_ptr,  # [T, COUNT] float32, out
    count_ptr,  # [T] int64, out: what top-k keeps, or without it top-n; COUNT or more: the row overflows
    num_vocab,
    num_tiles,
    num_groups,
    num_parts,
    stride_product_t,
    stride_product_v,
    stride_bias,
    stride_bitmask,
    vocab_start,
    scale,
    softcap,
    inverse_temperature,
    FINISH: tl.constexpr,
    COUNT: tl.constexpr,  # 0: thresholds alone
    LIST: tl.constexpr,  # entries among which the COUNT highest are chosen
    GROUPS: tl.constexpr,  # power of two >= num_groups
    TILES: tl.constexpr,  # power of two >= num_tiles
    PARTS: tl.constexpr,  # as for `narrow_kernel`, and its ROOM
    PART_ROOM: tl.constexpr,
    ROOM: tl.constexpr,  # of a row in the scratch
    GROUP: tl.constexpr,
    WALK: tl.constexpr,  # groups that are read at once
    BLOCK: tl.constexpr,  # entries of a whole row that are read at once
):
    row = tl.program_id(0).to(tl.int64)
    peak, total, moment, argmax = row_sums(
        tile_peak_ptr, tile_total_ptr, tile_moment_ptr, tile_argmax_ptr, row, num_tiles, TILES
    )
    log_total = tl.log(total)
    tl.store(first_ptr + row, peak + log_total if FINISH else peak)
    tl.store(second_ptr + row, log_total - moment / total if FINISH else total)
    tl.store(third_ptr + row, 1.0 / total if FINISH else moment)
    tl.store(argmax_ptr + row, argmax)

    groups = tl.arange(0, GROUPS)
    m_groups = groups < num_groups
    maxima = tl.load(group_max_ptr + row * num_groups + groups, mask=m_groups, other=LOWEST)
    lowest = tl.min(tl.where(m_groups, maxima, float("inf")), 0)
    options = row_options(
        temperature_ptr, None, None, None, bitmask_ptr, stride_bitmask, row, True, None, inverse_temperature, 1.0
    )
    call = (bias_ptr, None, bitmask_ptr, stride_bias, num_vocab, vocab_start, None, scale, softcap)
    reader = (product_ptr + row_starts(offset_ptr, row, True, stride_product_t), stride_product_v, options, call)
    top_k, top_n = row_rule(top_k_ptr, row, num_vocab), row_rule(top_n_ptr, row, num_vocab)
    top_p, min_p = tl.full([], float("inf"), tl.float32), 0.0
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
        top_p = tl.where(top_p < 1.0, top_p, float("inf"))
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + row)
    list_ptr += row * ROOM
    if COUNT > 0:
        index_ptr += row * 2 * ROOM
        score, index = highest_entries(
            reader, num_vocab, maxima, m_groups, peak, num_groups, index_ptr + ROOM, list_ptr, index_ptr,
            COUNT, LIST, GROUP, WALK,
        )  # fmt: skip
        kept = COUNT
        overflows = False
        if threshold_ptr is not None:
            kept, limited = apply_rules(score, peak, total, top_k, top_p, min_p, top_n, top_k_ptr is not None, COUNT)
            limited = tl.where(total == total, limited, 0)  # a row of NaN has no ties
            overflows = limited >= COUNT
            tl.store(count_ptr + row, limited.to(tl.int64))
            tl.store(threshold_ptr + row, halfway(nth(score, kept), nth(score, kept + 1), peak, lowest))
        slots = tl.arange(0, COUNT)
        score = tl.where(slots < kept, score, float("-inf"))
        score = tl.where(total == total, score, total)  # NaN somewhere in the row: NaN
        tl.store(scores_ptr + row * COUNT + slots, score)
        tl.store(ids_ptr + row * COUNT + slots, tl.where(slots < kept, index, 0).to(tl.int64))
    else:
        overflows = True
        if number_ptr is not None:
            parts = tl.arange(0, PARTS)
            numbers = tl.load(number_ptr + row * num_parts + parts, mask=parts < num_parts, other=0)
            overflows = tl.max(numbers, 0) > PART_ROOM
            if not overflows:
                narrowed = (key_ptr, mass_ptr, part_list_ptr, edge_ptr)
                threshold = listed_threshold(
                    narrowed, row, numbers, num_parts, peak, total, lowest, top_p, PARTS, PART_ROOM
                )
                tl.store(threshold_ptr + row, threshold)
    if threshold_ptr is not None:  # noqa: SIM102, known when this is compiled, the other one is not
        if overflows:
            threshold = row_threshold(
                reader, num_vocab, peak, total, lowest, top_k, top_p, min_p, top_n, list_ptr, BLOCK, ROOM
            )
            tl.store(threshold_ptr + row, threshold)
