"""The order of rows: which source and which rows make up a batch, as pure functions of a seed and a step.

Nothing here has a state that a checkpoint would need, and nothing knows how many processes there are: a run goes on at
exactly the row where it stopped, on as many of them as there are then.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

_ORDER, _POSITIVE, _NEGATIVE, _SOURCE, _SOURCE_SEED, _NUMBER = range(6)  # separate streams of the same seed


_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014), a bijection of 64-bit numbers: well-mixed bits of counters."""
    value = (value ^ (value >> 30)) * _FIRST & _MASK
    value = (value ^ (value >> 27)) * _SECOND & _MASK
    return value ^ (value >> 31)


def _mix_all(values: np.ndarray) -> np.ndarray:
    """`_mix` of each element of a uint64 array."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def _keys(count: int, *path: int) -> np.ndarray:
    """`count` uint64 random keys that depend on `path` alone; numpy's generators may change with its version."""
    state = 0
    for part in path:
        state = _mix(_mix((state + _STEP) & _MASK) ^ (part & _MASK))
    return _mix_all(np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP))


def _permutation(count: int, *path: int) -> np.ndarray:
    return np.argsort(_keys(count, *path), kind="stable")


def draw_number(low: int, high: int, *, seed: int, step: int) -> int:
    """A whole number from low to high (both may come), each as likely as the others: a function of (seed, step)."""
    return low + int(_keys(1, seed, _NUMBER, step)[0]) % (high - low + 1)


class BatchSampler:
    """Which rows make up the batch of a step: a pure function of (seed, step), so that a run resumes at any step
    exactly.

    Every epoch is a new permutation of all rows; the rows left over at its end (fewer than a batch) are dropped. The
    permutation of the epoch at hand is kept, 8 bytes a row (at most 16 more while it is made), so that 10^8 rows still
    fit. Raises ValueError if there are fewer rows than one batch needs.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_rows < batch_size:
            raise ValueError(f"a batch needs {batch_size} rows, the data has {num_rows}")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.steps_per_epoch = num_rows // batch_size
        self._order: tuple[int, np.ndarray] | None = None  # the epoch at hand: a cache, not a state

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that a step (from 0) belongs to."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """The `batch_size` distinct row indices of a step (from 0)."""
        epoch = self.epoch(step)
        cached = self._order
        if cached is None or cached[0] != epoch:
            cached = self._order = None  # lets go of the last one first
            cached = self._order = epoch, _permutation(self.num_rows, self.seed, _ORDER, epoch)
        start = (step - epoch * self.steps_per_epoch) * self.batch_size
        return cached[1][start : start + self.batch_size].tolist()

    def positive(self, step: int, index: int, count: int) -> int:
        """Which of the `count` positives of row `index` is used in a step; another draw in every epoch."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return int(np.argmin(_keys(count, self.seed, _POSITIVE, self.epoch(step), index)))

    def negatives(self, step: int, index: int, count: int, wanted: int) -> list[int]:
        """Which min(wanted, count) distinct ones of the `count` negatives of row `index` are used in a step."""
        return _permutation(count, self.seed, _NEGATIVE, self.epoch(step), index)[: max(wanted, 0)].tolist()


def source_seed(seed: int, source: int) -> int:
    """The seed of the order within a source; that of the first is the seed itself, as with one source alone."""
    return int(_keys(source, seed, _SOURCE_SEED)[-1]) if source else seed


_FRACTION_BITS = 32
_GOLDEN = 2654435769  # 2^32 / golden ratio: its multiples mod 2^32 are spread as evenly as can be


class SourceSchedule:
    """Which source each draw comes from: sources share the draws by weight, in a random order.

    Draws come in periods. In each period a source gets its share of the draws, rounded up or down (systematic
    sampling: the cumulated shares plus an offset of the period, in whole numbers), so that over many periods the
    shares are exact, and the draws of a period are then shuffled. Shares that are whole numbers are met in every
    period.
    """

    def __init__(self, weights: Sequence[float], period: int, *, seed: int = 0) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be numbers > 0, got {list(weights)}")
        if not 1 <= period < 2**30:
            raise ValueError(f"period must be from 1 to 2^30 - 1, got {period}")
        self.period, self.seed = period, seed
        # exact, so that every machine rounds alike
        total, cumulated = sum(map(Fraction, weights)), accumulate(map(Fraction, weights))
        edges = [int(period * edge / total * 2**_FRACTION_BITS) for edge in cumulated]
        self._edges = np.array([0, *edges], np.int64)
        self._first_offset = int(_keys(1, seed, _SOURCE)[0]) >> (64 - _FRACTION_BITS)
        self._at = -1, np.zeros(len(weights), np.int64), np.zeros(0, np.int64)  # a cache, not a state

    def counts(self, first: int, last: int) -> np.ndarray:
        """[last - first, sources] int64: draws of each source in the periods first .. last - 1."""
        offsets = np.arange(first, last, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._first_offset)
        offsets = (offsets & np.uint64(2**_FRACTION_BITS - 1)).astype(np.int64)
        return np.diff((self._edges + offsets[:, None]) >> _FRACTION_BITS, axis=1)

    def draw(self, number: int) -> tuple[int, int]:
        """(source, how many draws of that source came before) of draw `number` (from 0)."""
        if number < 0:
            raise ValueError(f"number must not be negative, got {number}")
        period, place = divmod(number, self.period)
        cached = self._at
        if cached[0] != period:
            cached = self._at = period, self._before(period, *cached[:2]), self._shuffled(period)
        _, before, order = cached
        source = int(order[place])
        return source, int(before[source] + np.count_nonzero(order[:place] == source))

    def _before(self, period: int, start: int, known: np.ndarray) -> np.ndarray:
        """[sources] draws of each source in all periods before, where `known` are those before period `start`."""
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
