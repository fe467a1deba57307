"""The lowest score that each row keeps, from the scores of a few rows in memory, in plain PyTorch.

It is found digit by digit of its bits, each digit by one histogram of what the entries weigh: one each for a number of
entries, their probability for a mass. Probabilities are integers, in units of 2^-40 of the row's largest, so that the
sums are the same in every order, on every device and for every division of the vocabulary. Nothing reads a value.
"""

from __future__ import annotations

import torch
from gircse_kernels.contract import Truncation
from torch import Tensor

from .chunk_scores import ordered_bits
from .vocab_parallel import Across

_DIGIT = 11  # bits of a score that one histogram settles
_UNIT = 2.0**40  # of probabilities, relative to the row's largest
_NEVER = torch.iinfo(torch.int64).max  # more than the entries of a row weigh together
# The highest score is kept even where a second one follows within rounding: the threshold stays this many units of
# the larger scores below it, where scores lower than 32 below the highest do not count (a mask of -1e30, say).
_MARGIN, _DEPTH = 32, 32.0


class Thresholds:
    """A function of the scores [R, V] of a few rows and of their rules, [R] each: the thresholds [R].

    All that is as large as the scores is in memory of its own, because fresh memory would cost more than the sums.
    """

    def __init__(self, across: Across) -> None:
        self.across = across
        self.buffers: tuple[Tensor, ...] = ()

    def _memory(self, scores: Tensor) -> tuple[Tensor, ...]:
        """Like the scores: one for floats, two for their bits, two for int64, one for flags."""
        if not self.buffers:  # the first rows are the most
            integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
            dtypes = scores.dtype, integer, integer, torch.int64, torch.int64, torch.bool
            self.buffers = tuple(torch.empty_like(scores, dtype=dtype) for dtype in dtypes)
        return tuple(buffer[: len(scores)] for buffer in self.buffers)

    def __call__(self, scores: Tensor, rules: Truncation) -> Tensor:
        across, (some, keys, shifted, digits, weights, kept) = self.across, self._memory(scores)
        if scores.shape[1]:
            low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        else:  # a shard without entries
            low = high = scores.new_full((len(scores), 1), torch.finfo(scores.dtype).min)
        peak = across.max(high.clone()).clamp_min(torch.finfo(scores.dtype).min)
        size = across.max(low.abs().maximum(high.abs()))
        ordered_bits(scores, keys)
        top_k, top_p, min_p, top_n = (None if rule is None else rule[:, None] for rule in rules)

        def highest(weights: Tensor, target: Tensor) -> Tensor:
            return _highest(keys, weights, target, across, shifted, digits)

        lowest = torch.full_like(peak, torch.iinfo(keys.dtype).min, dtype=keys.dtype)
        one = weights.new_ones(()).expand(keys.shape)
        if top_k is not None:
            lowest = highest(one, top_k)
        if top_p is not None:
            weights.copy_(torch.sub(scores, peak, out=some).exp_().mul_(_UNIT))
            if top_k is not None:
                weights.mul_(torch.ge(keys, lowest, out=kept))
            total = across.sum(weights.sum(1, keepdim=True))
            # a whole that only rounding keeps from reaching 1 is no limit
            target = torch.where(top_p < 1, (total.double() * top_p).ceil().to(torch.int64), _NEVER)
            lowest = torch.maximum(lowest, highest(weights, target))
        if min_p is not None:
            bound = peak + min_p.log()
            lowest = torch.maximum(lowest, ordered_bits(bound, torch.empty_like(lowest)))
        if top_n is not None:
            lowest = torch.maximum(lowest, highest(one, top_n))
        if not scores.shape[1]:
            last, following = torch.full_like(peak, torch.inf), torch.full_like(peak, -torch.inf)
        else:
            # As numbers without sign, keys - lowest are smallest where the lowest score is kept and largest where the
            # next lower one is removed; with the sign bit flipped they order so.
            zero = lowest ^ torch.iinfo(keys.dtype).min
            torch.sub(keys, zero, out=shifted)
            last, following = (bits + zero for bits in (shifted.amin(1, keepdim=True), shifted.amax(1, keepdim=True)))
            last = torch.where(last < lowest, torch.inf, _score(last, scores.dtype))
            following = torch.where(following >= lowest, -torch.inf, _score(following, scores.dtype))
        return between(across.min(last), across.max(following), peak, size)[:, 0]


def _score(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The scores of `ordered_bits`."""
    most = torch.iinfo(keys.dtype)
    return (keys ^ ((keys >> (most.bits - 1)) & most.max)).view(dtype)


def between(last: Tensor, following: Tensor, peak: Tensor, size: Tensor) -> Tensor:
    """The threshold between the last score that is kept and the next lower one, -inf where there is none.

    Args:
        peak: the highest score. size: the largest absolute one.
    """
    # where nothing is removed there is no following score, and -inf keeps everything
    size = size.minimum(peak.abs() + _DEPTH)
    return torch.minimum(last / 2 + following / 2, peak - _MARGIN * torch.finfo(peak.dtype).eps * size)


def _highest(keys: Tensor, weights: Tensor, target: Tensor, across: Across, shifted: Tensor, digits: Tensor) -> Tensor:
    """The highest integer x [R, 1] for which the weights of keys >= x sum to at least the target; the lowest integer if
    none does.

    Args:
        keys: [R, V], int32 or int64. weights: [R, V] int64, >= 0. target: [R, 1] int64.
        shifted, digits: memory for integers like keys, and for int64.
    """
    bits = torch.iinfo(keys.dtype).bits
    found = torch.full_like(keys[:, :1], torch.iinfo(keys.dtype).min)
    while bits:
        size = min(_DIGIT, bits)
        bits -= size
        # Lower keys count as digit 0, which is right without a look at its sum; higher ones have a place of their own.
        first = found >> bits
        torch.bitwise_right_shift(keys, bits, out=shifted)
        torch.minimum(torch.maximum(shifted, first, out=shifted), first + (1 << size), out=shifted)
        digits.copy_(shifted.sub_(first))
        histogram = digits.new_zeros((len(keys), (1 << size) + 1)).scatter_add_(1, digits, weights)
        sums = across.sum(histogram).flip(1).cumsum(1).flip(1)
        digit = (sums[:, : 1 << size] >= target).sum(1, keepdim=True) - 1
        found = found + (digit.clamp_min_(0) << bits).to(keys.dtype)
    return found
