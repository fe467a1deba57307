"""Which source and which rows make up a batch, as pure functions of a seed and a step.

There is no state that a checkpoint would have to save, and no dependence on the number of processes. So a run continues
at exactly the row where it stopped, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from gircse.integers import check_integer

_ORDER, _POSITIVE, _NEGATIVE, _SOURCE, _SOURCE_SEED, _NUMBER = range(6)  # separate streams of the same seed


_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014), a bijection of 64-bit numbers that mixes their bits well."""
    value = (value ^ (value >> 30)) * _FIRST & _MASK
    value = (value ^ (value >> 27)) * _SECOND & _MASK
    return value ^ (value >> 31)


def _mix_all(values: np.ndarray) -> np.ndarray:
    """`_mix` of each element of a uint64 array."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def _keys(count: int, *path: int) -> np.ndarray:
    """`count` uint64 random keys that depend on `path` only. numpy's generators may change with its version."""
    state = 0
    for part in path:
        state = _mix(_mix((state + _STEP) & _MASK) ^ (part & _MASK))
    return _mix_all(np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP))


def _permutation(count: int, *path: int) -> np.ndarray:
    return np.argsort(_keys(count, *path), kind="stable")


def draw_number(low: int, high: int, *, seed: int, step: int) -> int:
    """A whole number from `low` to `high`, both included and all equally likely, as a function of (seed, step)."""
    return low + int(_keys(1, seed, _NUMBER, step)[0]) % (high - low + 1)


class BatchSampler:
    """Which rows make up the batch of a step, as a pure function of (seed, step).

    Every epoch is a new permutation of all rows. Its last rows that do not fill a batch are dropped. The permutation of
    the current epoch is kept: 8 bytes for each row, and at most 16 more while it is made.

    Raises:
        ValueError: there are fewer rows than one batch needs.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int = 0) -> None:
        check_integer("batch_size", batch_size, least=1)
        if num_rows < batch_size:
            raise ValueError(f"data: got {num_rows} rows, expected {batch_size} or more, those of a batch")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.steps_per_epoch = num_rows // batch_size
        self._order: tuple[int, np.ndarray] | None = None  # the current epoch and its order: only a cache

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of a step (from 0)."""
        return check_integer("step", step, least=0) // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """The `batch_size` distinct row indices of a step (from 0)."""
        epoch = self.epoch(step)
        cached = self._order
        if cached is None or cached[0] != epoch:
            cached = self._order = None  # frees the last order before the next is made
            cached = self._order = epoch, _permutation(self.num_rows, self.seed, _ORDER, epoch)
        start = (step - epoch * self.steps_per_epoch) * self.batch_size
        return cached[1][start : start + self.batch_size].tolist()

    def positive(self, step: int, index: int, count: int) -> int:
        """Which of the `count` positives of row `index` a step uses. Every epoch draws anew."""
        check_integer("count", count, least=1)
        return int(np.argmin(_keys(count, self.seed, _POSITIVE, self.epoch(step), index)))

    def negatives(self, step: int, index: int, count: int, wanted: int) -> list[int]:
        """Which min(wanted, count) of the `count` negatives of row `index` a step uses, each at most once."""
        return _permutation(count, self.seed, _NEGATIVE, self.epoch(step), index)[: max(wanted, 0)].tolist()


def source_seed(seed: int, source: int) -> int:
    """The seed of the order within a source. That of the first source is `seed`, as for a single source."""
    return int(_keys(source, seed, _SOURCE_SEED)[-1]) if source else seed


_FRACTION_BITS = 32
_GOLDEN = 2654435769  # 2^32 / golden ratio, whose multiples mod 2^32 are spread most evenly


class SourceSchedule:
    """Which source each draw comes from: sources share the draws by weight, in a random order.

    Draws come in periods. In each period a source gets its share of the draws, rounded up or down, and then the draws
    are shuffled. Rounding is systematic sampling (the cumulated shares plus an offset of the period, in whole numbers),
    so that over many periods the shares are exact, and shares that are whole numbers are exact in every period.
    """

    def __init__(self, weights: Sequence[float], period: int, *, seed: int = 0) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights: got {list(weights)}, expected numbers > 0")
        check_integer("period", period, least=1, most=2**30 - 1)
        self.period, self.seed = period, seed
        # fractions, so that every machine rounds alike
        total, cumulated = sum(map(Fraction, weights)), accumulate(map(Fraction, weights))
        edges = [int(period * edge / total * 2**_FRACTION_BITS) for edge in cumulated]
        self._edges = np.array([0, *edges], np.int64)
        self._first_offset = int(_keys(1, seed, _SOURCE)[0]) >> (64 - _FRACTION_BITS)
        self._at = -1, np.zeros(len(weights), np.int64), np.zeros(0, np.int64)  # only a cache

    def counts(self, first: int, last: int) -> np.ndarray:
        """[last - first, sources] int64: how many draws of each source are in the periods first .. last - 1."""
        offsets = np.arange(first, last, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._first_offset)
        offsets = (offsets & np.uint64(2**_FRACTION_BITS - 1)).astype(np.int64)
        return np.diff((self._edges + offsets[:, None]) >> _FRACTION_BITS, axis=1)

    def draw(self, number: int) -> tuple[int, int]:
        """The source of draw `number` (from 0), and how many draws of that source come before it."""
        period, place = divmod(check_integer("number", number, least=0), self.period)
        cached = self._at
        if cached[0] != period:
            cached = self._at = period, self._before(period, *cached[:2]), self._shuffled(period)
        _, before, order = cached
        source = int(order[place])
        return source, int(before[source] + np.count_nonzero(order[:place] == source))

    def _before(self, period: int, start: int, known: np.ndarray) -> np.ndarray:
        """[sources] draws of each source in all periods before `period`; `known` has those before period `start`."""
        if 0 <= start <= period:
            total = known.copy()
        else:
            start, total = 0, np.zeros_like(known)
        for first in range(start, period, 2**16):
            total += self.counts(first, min(first + 2**16, period)).sum(axis=0)
        return total

    def _shuffled(self, period: int) -> np.ndarray:
        counts = self.counts(period, period + 1)[0]
        return np.repeat(np.arange(len(counts)), counts)[_permutation(self.period, self.seed, _SOURCE, 1 + period)]
