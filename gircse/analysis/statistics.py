"""Comparing settings query by query: a difference and its standard error, the smallest setting that is good enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean over the queries of `ours - theirs` and its standard error (0 for a single query).

    Args:
        ours, theirs: [n] finite numbers each, of the same queries.

    Raises:
        ValueError: other shapes, no queries, NaN or inf. TypeError: not numbers.
    """
    ours, theirs = _scores("ours", ours), _scores("theirs", theirs)
    if ours.shape != theirs.shape:  # which numpy would stretch
        raise ValueError(f"theirs: got {len(theirs)} numbers, expected {len(ours)}, one for each of ours")
    difference = ours - theirs
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {"mean": float(difference.mean()), "standard_error": float(error)}


def plateau(per_query: dict[int, np.ndarray]) -> tuple[int, int]:
    """-> the K with the best mean, and the smallest K that is not worse than it by more than a paired standard error.

    The one-standard-error rule (Breiman et al. 1984), paired over queries: the simplest that the data cannot tell from
    the best.

    Raises:
        ValueError, TypeError: no K, or scores as for `paired_difference`.
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
    scores = real_array(name, values).astype(np.float64)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{name}: got shape {scores.shape}, expected finite [n] with n >= 1")
    return scores


def real_array(name: str, values: object) -> np.ndarray:
    """`values` as an array of real numbers (float16 and float32 stay, everything else becomes float64).

    Raises:
        TypeError: it is none; names the argument.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors of another layout or without values
        raise TypeError(f"{name}: got {type(values).__name__}, expected an array of numbers") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: got {type(values).__name__} of dtype {array.dtype}, expected real numbers")
    return array if array.dtype in (np.float16, np.float32) else array.astype(np.float64)
