"""Intervals for the quality study: queries and seeds are resampled together, differences are paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.quality_measure import ndcg

Run = dict[str, Any]  # of a record, see `bench.quality.collect`

_RESAMPLES = 2000
_LEVEL = 95  # per cent


class Estimate(NamedTuple):
    """A mean, the ends of its 95% bootstrap interval, and the seeds it is over."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero: for differences."""
        return self.low > 0 or self.high < 0


def per_query(runs: Sequence[Run], k: int) -> np.ndarray:
    """nDCG@10 at K = `k`, [seeds, queries]."""
    return np.stack([ndcg(run["ranks"][str(k)]) for run in runs])


def estimate(values: np.ndarray) -> Estimate:
    """The mean of [seeds, queries] values, or of differences of them.

    Percentile bootstrap (Efron 1979) with seeds and queries both drawn with replacement; one seed says nothing about
    others, so that its interval is of the queries alone.
    """
    seeds, queries = values.shape
    rng = np.random.default_rng(0)
    drawn = rng.integers(queries, size=(_RESAMPLES, queries))
    who = rng.integers(seeds, size=(_RESAMPLES, seeds))
    means = np.array([values[rows][:, columns].mean() for rows, columns in zip(who, drawn, strict=True)])
    tail = (100 - _LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high), seeds)


def difference(ours: dict[int, Run], theirs: dict[int, Run], our_k: int, their_k: int) -> Estimate | None:
    """`ours` at K = `our_k` minus `theirs` at `their_k`, over the seeds that both have; None: there are none.

    Args:
        ours, theirs: runs of one corpus, by seed.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    first = per_query([ours[seed] for seed in seeds], our_k)
    return estimate(first - per_query([theirs[seed] for seed in seeds], their_k))
