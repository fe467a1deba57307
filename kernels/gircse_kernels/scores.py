"""Device functions that every kernel shares: from dot products to scores, Gumbel noise, safe maxima.

Row by row, with `x = h . w_v + bias_v` accumulated in float32::

    score_v = softcap * tanh(x * logit_scale / softcap) / temperature + noise_scale * gumbel(seed, v)      with soft-cap
    score_v = x * logit_scale / temperature                           + noise_scale * gumbel(seed, v)      without

With a threshold, an entry whose score without noise lies below its row's is removed, and with a bitmask every entry
whose bit is 0: their scores are -inf.
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
def random_bits(seed, index, ALIGNED: tl.constexpr):
    """uint32: lane v % 4 of Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = v // 4.

    `seed` int64, a scalar or a column; `index` int64, consecutive vocabulary indices as a vector or a row. With ALIGNED
    the first index is a multiple of 4 and each counter is computed once for its four lanes.
    """
    if ALIGNED:
        quads: tl.constexpr = index.shape[-1] // 4
        counter = (tl.min(index) // 4 + tl.arange(0, quads)).to(tl.uint32)
        if len(index.shape) == 1:
            a, b, c, d = tl.randint4x(seed, counter)
            bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * quads])
        else:
            seeds, counters = tl.broadcast(seed, counter[None, :])
            a, b, c, d = tl.randint4x(seeds, counters)
            bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4 * quads])
    else:
        seeds, counters = tl.broadcast(seed, (index // 4).to(tl.uint32))
        a, b, c, d = tl.randint4x(seeds, counters)
        lane = index % 4
        bits = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def gumbel_noise(seed, index, ALIGNED: tl.constexpr):
    """Standard Gumbel noise of the shape of `random_bits`, float32: -log(Exp(1)), Exp(1) = -log(1 - w), w in (0, 1).

    Small w is the large noise that decides which entry wins. It keeps the full relative resolution of 32 random bits:
    there -log(1 - w) is computed by its series, because 1 - w would be rounded.
    """
    bits = random_bits(seed, index, ALIGNED)
    w = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (bits + 1/2) / 2^32
    series = w * (1.0 + w * (0.5 + w * (1 / 3 + w * (0.25 + w * 0.2))))
    exponential = tl.where(w < 0.015625, series, -tl.log(1.0 - tl.minimum(w, 0.99999994)))
    return -tl.log(exponential)


@triton.jit
def row_numbers(number_ptr, rows, in_range, number):
    """A float32 number of each row, in the shape of `rows`; the call's one number where rows have none of their own."""
    if number_ptr is not None:
        return tl.load(number_ptr + rows, mask=in_range, other=1.0).to(tl.float32)
    else:
        return number


@triton.jit
def row_options(
    temperature_ptr,  # [T]; None: no such option, as for the next four
    noise_scale_ptr,  # [T]
    seed_ptr,  # [T] int64
    threshold_ptr,  # [T]
    bitmask_ptr,  # [T, W] int32
    stride_bitmask,
    rows,  # a scalar or a column
    in_range,
    seed,  # None: no noise; any number where rows have their own
    inverse_temperature,  # the call's numbers, for rows without their own
    noise_scale,
):
    """What `scores` needs of each row, in the shape of `rows`; 0, which nobody reads, for an option that is off."""
    inverse = inverse_temperature
    if temperature_ptr is not None:
        inverse = 1.0 / row_numbers(temperature_ptr, rows, in_range, 1.0)
    noise_scales = row_numbers(noise_scale_ptr, rows, in_range, noise_scale)
    thresholds = row_numbers(threshold_ptr, rows, in_range, 0.0)
    seeds = 0
    if seed_ptr is not None:
        seeds = tl.load(seed_ptr + rows, mask=in_range, other=0)
    elif seed is not None:
        seeds = tl.cast(seed, tl.int64)
    words = 0
    if bitmask_ptr is not None:
        words = bitmask_ptr + tl.where(in_range, rows, 0).to(tl.int64) * stride_bitmask
    return inverse, noise_scales, seeds, thresholds, words


@triton.jit
def scores(
    product,  # float32, h . w of rows and vocabulary entries
    vocab,  # index in this shard, broadcasts against the product
    row,  # of `row_options`, broadcasts against the product
    call,  # see below
    ALIGNED: tl.constexpr,
):
    """Scores, tanh of the capped logits (the scores without noise where there is no soft-cap), and the noise; not
    masked beyond the vocabulary.

    `call`: pointers to bias [V], thresholds and bitmask; the bias's stride, V, the shard's first index in the whole
    vocabulary, and of `launching.score_scalars` seed, scale and soft-cap. An option that is None when the kernel is
    launched is known to be so by the compiler and costs no instruction.
    """
    inverse, noise_scales, seeds, thresholds, words = row
    bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap = call
    index = vocab.to(tl.int64)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + index * stride_bias, mask=vocab < num_vocab, other=0.0).to(tl.float32)
    if softcap is not None:
        capped = tanh(product * scale)
        score = capped * (softcap * inverse)
    else:
        score = product * (scale * inverse)
        capped = score
    if bitmask_ptr is not None:
        word = tl.load(words + (index + vocab_start) // 32, mask=vocab < num_vocab, other=0)
        score = tl.where((word >> ((index + vocab_start) % 32).to(tl.int32)) & 1 == 1, score, float("-inf"))
    if threshold_ptr is not None:
        kept = score >= thresholds  # what is kept does not depend on the noise
    noise = 0.0
    if seed is not None:
        noise = gumbel_noise(seeds, index + vocab_start, ALIGNED)
        score += noise * noise_scales
    if threshold_ptr is not None:
        score = tl.where(kept, score, float("-inf"))
    return score, capped, noise


@triton.jit
def reference(peak):
    """What the exponentials of a row are relative to in form 3: its highest score, down to a multiple of 8."""
    return tl.floor(peak * 0.125) * 8.0


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
