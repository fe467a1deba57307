"""Top-p alone, by all multiprocessors: two passes narrow the range of the threshold, one lists what lies in it.

A pass divides the range into BINS thresholds. The programs of a row, one for each part of BLOCK entries, sum the
probabilities that reach each of them; the next pass finds, from the sums of all parts, between which two the wanted
threshold lies. After two passes the range is a few hundredths of a nat. The third writes the entries inside it to lists
of ROOM for each part, with the lowest score above and the highest one below, and `listed_threshold` has the rest to do
in registers. Where a part has more entries in the range, as with many equal scores, `threshold.row_threshold` searches
instead.
"""

import triton
import triton.language as tl

from ...scores import LOWEST, reference, row_options
from ..many_rows import row_starts
from .threshold import BOTTOM, BY_VALUE, halfway, key_score, middle, ordered_key, row_scores

BINS = tl.constexpr(16)


@triton.jit
def peak_and_total(tile_peak_ptr, tile_total_ptr, row, num_tiles, TILES: tl.constexpr):
    """Of a row, from the sums of its tiles: highest score, and sum of e^(score - highest score)."""
    tiles = tl.arange(0, TILES)
    m_tiles = tiles < num_tiles
    peaks = tl.load(tile_peak_ptr + row * num_tiles + tiles, mask=m_tiles, other=LOWEST)
    peak = tl.max(peaks, 0)
    decays = tl.where(m_tiles, tl.exp(reference(peaks) - peak), 0.0)
    return peak, tl.sum(tl.load(tile_total_ptr + row * num_tiles + tiles, mask=m_tiles, other=0.0) * decays, 0)


@triton.jit
def bracket(keys_ptr, masses_ptr, row, num_parts, target, top, PARTS: tl.constexpr):
    """Between which thresholds of a pass the mass reaches the target: two int64 keys, and the mass at the upper one."""
    bins = tl.arange(0, BINS)
    parts = tl.arange(0, PARTS)[:, None]
    keys = tl.load(keys_ptr + row * BINS + bins).to(tl.int64)
    p_masses = masses_ptr + (row * num_parts + parts) * BINS + bins[None, :]
    masses = tl.sum(tl.load(p_masses, mask=parts < num_parts, other=0.0), 0)
    enough = masses >= target
    low = tl.max(tl.where(enough, keys, BOTTOM), 0)
    return low, tl.min(tl.where(enough, top, keys), 0), tl.max(tl.where(enough, 0.0, masses), 0)


@triton.jit(do_not_specialize=["vocab_start", "num_tiles", "num_parts"])
def narrow_kernel(
    product_ptr,  # these as for `select_kernel`
    offset_ptr,
    tile_peak_ptr,
    tile_total_ptr,
    bias_ptr,
    temperature_ptr,
    bitmask_ptr,
    top_p_ptr,  # [T] float32
    old_key_ptr,  # [T, BINS] int32, thresholds of the pass before; None: this is the first
    old_mass_ptr,  # [T, parts, BINS] float32
    key_ptr,  # [T, BINS] int32, out; None: this one lists
    mass_ptr,  # [T, parts, BINS] float32, out
    list_ptr,  # [T, parts, ROOM] float32, out where it lists, as the next two
    number_ptr,  # [T, parts] int32: how many entries there are in the range
    edge_ptr,  # [T, parts, 2] float32: lowest score above the range, highest one below
    num_vocab,
    num_tiles,
    num_parts,
    stride_product_t,
    stride_product_v,
    stride_bias,
    stride_bitmask,
    vocab_start,
    scale,
    softcap,
    inverse_temperature,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,  # power of two >= num_parts
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    row, part = slot // num_parts, slot % num_parts
    peak, total = peak_and_total(tile_peak_ptr, tile_total_ptr, row, num_tiles, TILES)
    top_p = tl.load(top_p_ptr + row)
    top = ordered_key(peak).to(tl.int64) + 1
    options = row_options(
        temperature_ptr, None, None, None, bitmask_ptr, stride_bitmask, row, True, None, inverse_temperature, 1.0
    )
    call = (bias_ptr, None, bitmask_ptr, stride_bias, num_vocab, vocab_start, None, scale, softcap)
    reader = (product_ptr + row_starts(offset_ptr, row, True, stride_product_t), stride_product_v, options, call)
    score = row_scores(reader, part.to(tl.int32) * BLOCK + tl.arange(0, BLOCK), num_vocab, True)
    key = ordered_key(score)
    if old_key_ptr is None:
        # entries of less than (1 - top_p) / V have together less than 1 - top_p, so more than top_p is above
        floor = peak + tl.log((1.0 - top_p) * total / num_vocab) - 1.0
        low, high = ordered_key(floor).to(tl.int64), top
    else:
        low, high, _mass = bracket(old_key_ptr, old_mass_ptr, row, num_parts, top_p * total, top, PARTS)
    if key_ptr is not None:
        low_score, high_score = key_score(low.to(tl.int32)), key_score(high.to(tl.int32))
        prob = tl.exp(score - peak)
        for j in tl.static_range(BINS):
            value = low_score * (1.0 - j / BINS) + high_score * (j / BINS)
            at = tl.minimum(tl.maximum(ordered_key(value).to(tl.int64), low), high).to(tl.int32)
            tl.store(mass_ptr + slot * BINS + j, tl.sum(tl.where(key >= at, prob, 0.0), 0))
            if part == 0:
                tl.store(key_ptr + row * BINS + j, at)
    else:
        undecided = ((key >= low) & (key < high)).to(tl.int32)
        position = tl.cumsum(undecided, 0) - 1
        tl.store(list_ptr + slot * ROOM + position, score, mask=(undecided > 0) & (position < ROOM))
        tl.store(number_ptr + slot, tl.sum(undecided, 0))
        tl.store(edge_ptr + 2 * slot, tl.min(tl.where(key >= high, score, float("inf")), 0))
        tl.store(edge_ptr + 2 * slot + 1, tl.max(tl.where(key < low, score, float("-inf")), 0))


@triton.jit
def listed_threshold(
    narrowed, row, numbers, num_parts, peak, total, lowest, top_p, PARTS: tl.constexpr, ROOM: tl.constexpr
):
    """As `threshold.row_threshold`, from the lists. `narrowed`: pointers to keys, masses, lists and edges."""
    key_ptr, mass_ptr, list_ptr, edge_ptr = narrowed
    target = top_p * total
    top = ordered_key(peak).to(tl.int64) + 1
    low, high, mass_high = bracket(key_ptr, mass_ptr, row, num_parts, target, top, PARTS)
    parts = tl.arange(0, PARTS)
    slots = tl.arange(0, ROOM)[None, :]
    p_list = list_ptr + (row * num_parts + parts[:, None]) * ROOM + slots
    score = tl.reshape(tl.load(p_list, mask=slots < numbers[:, None], other=float("-inf")), [PARTS * ROOM])
    keys = ordered_key(score)
    weight = tl.exp(score - peak)
    while high - low > 1:
        key = middle(low, high, BY_VALUE)
        enough = mass_high + tl.sum(tl.where(keys >= key, weight, 0.0), 0) >= target
        low = tl.where(enough, key, low)
        high = tl.where(enough, high, key)
    kept = keys >= low
    p_edge = edge_ptr + 2 * (row * num_parts + parts)
    above = tl.min(tl.load(p_edge, mask=parts < num_parts, other=float("inf")), 0)
    below = tl.max(tl.load(p_edge + 1, mask=parts < num_parts, other=float("-inf")), 0)
    last = tl.minimum(above, tl.min(tl.where(kept, score, float("inf")), 0))
    following = tl.maximum(below, tl.max(tl.where(kept, float("-inf"), score), 0))
    found = halfway(last, following, peak, lowest)
    return tl.where(top_p < 1.0, found, float("-inf"))
