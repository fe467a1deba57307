"""Device functions that every kernel shares: from dot products to scores, Gumbel noise, safe maxima.

Row by row, with `x = h . w_v + bias_v` accumulated in float32::

    score_v = (softcap * tanh(x * logit_scale / softcap) + gumbel(seed, v)) / temperature        with soft-cap
    score_v = (x * logit_scale                           + gumbel(seed, v)) / temperature        without

With a threshold, an entry whose score without noise lies below its row's is removed: its score is -inf.
The launcher folds the scalars: `scale` is logit_scale, or logit_scale / softcap.
"""

import triton
import triton.language as tl

# The running maximum starts here, not at -inf: tiles whose scores are all -inf then give exp(-inf) = 0, not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Below this exp is 0. A finite stand-in for log 0, whose product with that 0 would be NaN.
LOG_FLOOR = tl.constexpr(-1e4)


@triton.jit
def tanh(x):
    """Relative error of a few float32 units; 1 - 2 / (1 + exp(2x)) alone loses all digits near 0."""
    square = x * x
    # Taylor: next term 1382/155925 x^11, relative 1e-8 at 0.25
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def random_bits(seed, index, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """uint32 [BLOCK_T, BLOCK_V]: lane v % 4 of Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = v // 4.

    `seed` int64 [BLOCK_T], `index` int64 [BLOCK_V] consecutive vocabulary indices. With ALIGNED the first is a
    multiple of 4 and each counter is computed once for its four lanes.
    """
    if ALIGNED:
        quads: tl.constexpr = BLOCK_V // 4
        counter = tl.min(index, 0) // 4 + tl.arange(0, quads)
        counters = tl.broadcast_to(counter.to(tl.uint32)[None, :], [BLOCK_T, quads])
        seeds = tl.broadcast_to(seed[:, None], [BLOCK_T, quads])
        a, b, c, d = tl.randint4x(seeds, counters)
        bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_T, BLOCK_V])
    else:
        counters = tl.broadcast_to((index // 4).to(tl.uint32)[None, :], [BLOCK_T, BLOCK_V])
        seeds = tl.broadcast_to(seed[:, None], [BLOCK_T, BLOCK_V])
        a, b, c, d = tl.randint4x(seeds, counters)
        lane = tl.broadcast_to((index % 4)[None, :], [BLOCK_T, BLOCK_V])
        bits = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def gumbel_noise(seed, index, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Standard Gumbel noise [BLOCK_T, BLOCK_V], float32: -log(Exp(1)), Exp(1) = -log(1 - w), w uniform in (0, 1).

    Small w, the large noise that decides who wins, keeps the full relative resolution of 32 random bits: there
    -log(1 - w) is its own series, as 1 - w would be rounded.
    """
    bits = random_bits(seed, index, ALIGNED, BLOCK_T, BLOCK_V)
    w = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (bits + 1/2) / 2^32
    series = w * (1.0 + w * (0.5 + w * (1 / 3 + w * (0.25 + w * 0.2))))
    exponential = tl.where(w < 0.015625, series, -tl.log(1.0 - tl.minimum(w, 0.99999994)))
    return -tl.log(exponential)


@triton.jit
def row_factors(temperature_ptr, rows, inverse_temperature, in_range, HAS_TEMPERATURE: tl.constexpr):
    """1 / temperature of each row, [BLOCK_T]."""
    if HAS_TEMPERATURE:
        return 1.0 / tl.load(temperature_ptr + rows, mask=in_range, other=1.0).to(tl.float32)
    return tl.zeros_like(rows).to(tl.float32) + inverse_temperature


@triton.jit
def row_seeds(seed_ptr, rows, seed, in_range, GUMBEL: tl.constexpr):
    """int64 [BLOCK_T]: the call's one seed (GUMBEL = 1), or each row's own (2)."""
    if GUMBEL == 2:
        return tl.load(seed_ptr + rows, mask=in_range, other=0)
    return tl.zeros_like(rows).to(tl.int64) + seed


@triton.jit
def row_thresholds(threshold_ptr, rows, in_range, THRESHOLD: tl.constexpr):
    """The lowest score that each row keeps, [BLOCK_T]; not read without THRESHOLD."""
    if THRESHOLD:
        return tl.load(threshold_ptr + rows, mask=in_range, other=0.0)
    return tl.zeros_like(rows).to(tl.float32)


@triton.jit
def scores(
    dot,  # [BLOCK_T, BLOCK_V] float32, h . w
    bias_ptr,
    vocab,  # [BLOCK_V] int64, index in this shard
    vocab_start,  # the shard's first index in the whole vocabulary
    num_vocab,
    stride_bias,
    inverse_temperature,  # [BLOCK_T]
    seed,  # [BLOCK_T] int64
    threshold,  # [BLOCK_T]
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    GUMBEL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Scores and tanh of the capped logits (the scores again without soft-cap); not masked beyond the vocabulary."""
    if HAS_BIAS:
        dot += tl.load(bias_ptr + vocab * stride_bias, mask=vocab < num_vocab, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        capped = tanh(dot * scale)
        score = capped * (softcap * inverse_temperature)[:, None]
    else:
        score = dot * (scale * inverse_temperature)[:, None]
        capped = score
    if THRESHOLD:
        kept = score >= threshold[:, None]  # what is kept does not depend on the noise
    if GUMBEL != 0:
        score += gumbel_noise(seed, vocab + vocab_start, ALIGNED, BLOCK_T, BLOCK_V) * inverse_temperature[:, None]
    if THRESHOLD:
        score = tl.where(kept, score, float("-inf"))
    return score, capped


@triton.jit
def tile_softmax(score, valid, STATS: tl.constexpr):
    """Of a tile [BLOCK_T, BLOCK_V]: highest score and its position, score with invalid columns at -inf.

    The position is the lowest of a tie, and 0 where nothing is above -inf.
    """
    score = tl.where(valid[None, :], score, float("-inf"))
    if STATS:
        highest, position = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
    else:
        highest = tl.max(score, 1)
        position = tl.zeros_like(highest).to(tl.int32)
    # a row of NaN has no highest score: any finite one will do, its sum is NaN
    return score, tl.maximum(highest, LOWEST), position
