"""Comparisons of two settings query by query, and the smallest setting that is good enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gircse.evaluation.metrics import finite_tensor


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The mean over the queries of `ours - theirs`, and its standard error (0 for a single query).

    Args:
        ours, theirs: [n] scores of the same queries.

    Raises:
        TypeError: no numbers.
        ValueError: other shapes, no query, NaN or infinity.
    """
    ours, theirs = _scores("ours", ours), _scores("theirs", theirs)
    if ours.shape != theirs.shape:  # numpy would broadcast a single score
        raise ValueError(f"theirs: got {len(theirs)} numbers, expected {len(ours)}, one for each of ours")
    difference = ours - theirs
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {"mean": float(difference.mean()), "standard_error": float(error)}


def plateau(per_query: dict[int, np.ndarray]) -> tuple[int, int]:
    """The K with the best mean, and the smallest K that is not worse by more than a paired standard error.

    This is the one-standard-error rule (Breiman et al. 1984), paired over queries: it chooses the smallest K that the
    data cannot tell from the best.

    Raises:
        TypeError, ValueError: there is no K; scores as for `paired_difference`.
    """
    if not isinstance(per_query, Mapping):
        raise TypeError(f"per_query: got {type(per_query).__name__}, expected {{K: scores}}")
    if not per_query:
        raise ValueError("per_query: got no K, expected at least one")
    per_query = {k: _scores(f"per_query[{k!r}]", scores) for k, scores in per_query.items()}
    best = max(per_query, key=lambda k: per_query[k].mean())
    for k in sorted(per_query):
        lost = paired_difference(per_query[best], per_query[k])
        if lost["mean"] <= lost["standard_error"]:
            return best, k
    return best, best


def _scores(name: str, values: np.ndarray) -> np.ndarray:
    """[n] float64."""
    return finite_tensor(name, values, 1).cpu().double().numpy()
