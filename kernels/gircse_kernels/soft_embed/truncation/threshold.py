"""The lowest score that the truncation rules keep of a row, over all its entries, which are in memory.

Each rule keeps the highest scores, so it is a search for the highest key x at which a measure of the entries that reach
x is still enough: their number (top-k, top-n) or their probability (top-p). `search` bisects, at first with one pass
over the row, in L2, for each step; as soon as few enough entries lie between its bounds it writes them to a list and
goes on there, in registers. Scores are compared as int32 keys that order as the floats do.
"""

import triton
import triton.language as tl

from ...scores import scores

BOTTOM = tl.constexpr(-2139095040)  # the key of the lowest finite score: below all but -inf
# A score within so many float32 units of the highest one stays, because another pass may round both otherwise.
MARGIN = tl.constexpr(32.0 * 1.1920928955078125e-07)
DEPTH = tl.constexpr(32.0)
BY_VALUE = tl.constexpr(16)  # steps that halve a range of scores; later ones halve a range of keys
NEAR = tl.constexpr(64.0)  # where a search begins: so far below the highest score


@triton.jit
def ordered_key(score):
    """int32 that orders as the score does; of both zeros the same."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def key_score(key):
    """The score of an int32 key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high, step):
    """A key between two int64 keys that are at least 2 apart: of the score half way, or, so that the search ends
    whatever the scores, half way between the keys."""
    value = 0.5 * key_score(low.to(tl.int32)) + 0.5 * key_score(high.to(tl.int32))
    key = tl.where(step < BY_VALUE, ordered_key(value).to(tl.int64), (low + high) >> 1)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def row_scores(reader, vocab, num_vocab, inside):
    """Scores without noise of some entries of a row, read from memory; -inf where there is none, and for NaN.

    `reader`: pointer to the row's products, their stride, and `row` and `call` as `scores` takes them.
    """
    product_ptr, stride, row, call = reader
    inside = inside & (vocab < num_vocab)
    product = tl.load(product_ptr + vocab.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    score, _, _ = scores(product, vocab, row, call, False)
    return tl.where(inside & (score == score), score, float("-inf"))


@triton.jit
def reaching(reader, num_vocab, key, peak, BLOCK: tl.constexpr):
    """Of the entries that reach a key: their number, and the sum of their probabilities, relative to the peak."""
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, num_vocab, BLOCK, num_stages=3):
        score = row_scores(reader, start + tl.arange(0, BLOCK), num_vocab, True)
        reached = ordered_key(score) >= key
        counts += reached.to(tl.int32)
        masses += tl.where(reached, tl.exp(score - peak), 0.0)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def search(
    reader, num_vocab, peak, by_mass, target, low, high, count_low, count_high, mass_high, list_ptr,
    BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The highest key that is reached by `target` (float32) entries, or by entries of that mass.

    Enough reach `low`, too few reach `high`; how many reach either one is given, and of `high` their mass, too.
    """
    step = 0
    while (count_low - count_high > ROOM) & (high - low > 1):
        key = middle(low, high, step)
        count, mass = reaching(reader, num_vocab, key, peak, BLOCK)
        enough = tl.where(by_mass, mass, count.to(tl.float32)) >= target
        low = tl.where(enough, key, low)
        high = tl.where(enough, high, key)
        count_low = tl.where(enough, count, count_low)
        count_high = tl.where(enough, count_high, count)
        mass_high = tl.where(enough, mass_high, mass)
        step += 1
    if high - low > 1:
        listed = 0
        tl.debug_barrier()  # the list may still be read by a search before
        for start in range(0, num_vocab, BLOCK):
            score = row_scores(reader, start + tl.arange(0, BLOCK), num_vocab, True)
            key = ordered_key(score)
            undecided = ((key >= low) & (key < high)).to(tl.int32)
            position = listed + tl.cumsum(undecided, 0) - 1
            tl.store(list_ptr + position, score, mask=(undecided > 0) & (position < ROOM))
            listed += tl.sum(undecided, 0)
        tl.debug_barrier()
        slots = tl.arange(0, ROOM)
        score = tl.load(list_ptr + slots, mask=slots < listed, other=float("-inf"))
        keys = ordered_key(score)
        weight = tl.where(by_mass, tl.exp(score - peak), 1.0)
        missing = target - tl.where(by_mass, mass_high, count_high.to(tl.float32))
        while high - low > 1:
            key = middle(low, high, BY_VALUE)
            enough = tl.sum(tl.where(keys >= key, weight, 0.0), 0) >= missing
            low = tl.where(enough, key, low)
            high = tl.where(enough, high, key)
    return low


@triton.jit
def row_threshold(
    reader, num_vocab, peak, total, lowest, top_k, top_p, min_p, top_n, list_ptr, BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    """The lowest score that the rules keep, half way to the next lower one; -inf where they keep everything.

    Args:
        peak, total: highest score, and sum of e^(score - peak) over the row.
        lowest: a low score; with the highest one it tells how large the scores are that are rounded.
        top_k, top_p, min_p, top_n: float32 numbers of this row; num_vocab, inf, 0, num_vocab stand for no such rule.
        list_ptr: room for ROOM float32.
    """
    top = ordered_key(peak).to(tl.int64) + 1
    low = tl.full([], BOTTOM, tl.int64)
    for rule in range(3):  # top-k, then top-p and min-p, then top-n
        count, mass = num_vocab, total
        if low > BOTTOM:
            count, mass = reaching(reader, num_vocab, low, peak, BLOCK)
        by_mass = rule == 1
        target = tl.where(by_mass, top_p * mass, tl.where(rule == 0, top_k, top_n))
        if tl.where(by_mass, top_p < 1.0, count > target):
            # entries of less than (1 - top_p) / V have together less than 1 - top_p, so more than top_p is above
            floor = tl.log((1.0 - top_p) * mass / num_vocab) - 1.0
            near = ordered_key(peak + tl.where(by_mass, floor, -NEAR)).to(tl.int64)
            near = tl.maximum(near, low)
            near_count, near_mass = reaching(reader, num_vocab, near, peak, BLOCK)
            enough = tl.where(by_mass, near_mass, near_count.to(tl.float32)) >= target
            low = search(
                reader, num_vocab, peak, by_mass, target, tl.where(enough, near, low), tl.where(enough, top, near),
                tl.where(enough, near_count, count), tl.where(enough, 0, near_count),
                tl.where(enough, 0.0, near_mass), list_ptr, BLOCK, ROOM,
            )  # fmt: skip
        if by_mass:
            low = tl.maximum(low, ordered_key(peak + tl.log(min_p)).to(tl.int64))
    lasts = tl.full([BLOCK], float("inf"), tl.float32)
    followings = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, num_vocab, BLOCK, num_stages=3):
        score = row_scores(reader, start + tl.arange(0, BLOCK), num_vocab, True)
        kept = ordered_key(score) >= low
        lasts = tl.minimum(lasts, tl.where(kept, score, float("inf")))
        followings = tl.maximum(followings, tl.where(kept, float("-inf"), score))
    return halfway(tl.min(lasts, 0), tl.max(followings, 0), peak, lowest)


@triton.jit
def halfway(last, following, peak, lowest):
    """Between the lowest score that is kept and the next lower one. The highest score stays even where a second one
    follows within rounding."""
    size = tl.minimum(tl.maximum(tl.abs(peak), tl.abs(lowest)), tl.abs(peak) + DEPTH)
    return tl.minimum(0.5 * last + 0.5 * following, peak - MARGIN * size)
