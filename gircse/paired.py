"""Comparing settings query by query: a difference and its standard error, the smallest setting that is good enough."""

from __future__ import annotations

import numpy as np


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean over the queries of `ours - theirs` and its standard error (0 for a single query)."""
    difference = ours - theirs
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {"mean": float(difference.mean()), "standard_error": float(error)}


def plateau(per_query: dict[int, np.ndarray]) -> tuple[int, int]:
    """-> the K with the best mean, and the smallest K that is not worse than it by more than a paired standard error.

    The one-standard-error rule (Breiman et al. 1984), paired over queries: the simplest that the data cannot tell from
    the best.
    """
    best = max(per_query, key=lambda k: per_query[k].mean())
    for k in sorted(per_query):
        lost = paired_difference(per_query[best], per_query[k])
        if lost["mean"] <= lost["standard_error"]:
            return best, k
    return best, best
