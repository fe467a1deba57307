"""Clustering quality of embeddings: k-means, and the V-measure of its clusters against labels.

As MTEB scores clustering tasks (k-means with as many clusters as labels, V-measure), without scikit-learn.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from gircse.analysis.statistics import real_array
from gircse.integers import as_integer

_MAX_ITERATIONS = 100
_MAX_RESTARTS = 1000
_CHUNK = 1 << 22  # distances held at once, in numbers


def v_measure(labels: Sequence[Any], clusters: Sequence[Any]) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007): 0..1, symmetric.

    Args:
        labels, clusters: n hashable values each; only which ones are equal counts.

    Raises:
        ValueError: empty, or of different lengths. TypeError: no sequence, or a value that is not hashable.
    """
    rows, columns = _codes("labels", labels), _codes("clusters", clusters)
    if len(rows) != len(columns) or not len(rows):
        raise ValueError(f"labels and clusters: got {len(rows)} and {len(columns)} values, expected the same n >= 1")
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))
    of_labels, of_clusters, of_both = _entropy(joint.sum(1)), _entropy(joint.sum(0)), _entropy(joint)
    mutual = max(0.0, of_labels + of_clusters - of_both)
    # one label (cluster) only: every clustering is homogeneous (complete)
    homogeneity = mutual / of_labels if of_labels else 1.0
    completeness = mutual / of_clusters if of_clusters else 1.0
    total = homogeneity + completeness
    return min(1.0, float(2 * homogeneity * completeness / total)) if total else 0.0


def _codes(name: str, values: Sequence[Any]) -> np.ndarray:
    """Each value's number in the order of first occurrence."""
    codes: dict[Any, int] = {}
    try:
        return np.array([codes.setdefault(value, len(codes)) for value in values], dtype=np.int64)
    except (TypeError, RuntimeError, NotImplementedError) as error:  # no iterable, or of lists, or a sparse tensor
        raise TypeError(f"{name}: {error}, expected a sequence of hashable values") from None


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum()) if len(shares) > 1 else 0.0


def kmeans(points: np.ndarray, num_clusters: int, *, seed: int, restarts: int = 4) -> np.ndarray:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007), the best of `restarts` by inertia.

    Args:
        points: [n, D], real numbers; computed in float32, scaled to fit it.
        num_clusters: 1..n.
        seed: >= 0; the same one gives the same clusters.
        restarts: 1..1000.

    Returns:
        [n] int64 cluster numbers, below `num_clusters`; a cluster may be empty where points coincide.

    Raises:
        ValueError: wrong shape, NaN or inf, `num_clusters`, `seed` or `restarts` out of range. TypeError: not numbers.
    """
    points = real_array("points", points)
    if points.ndim != 2 or 0 in points.shape or not np.isfinite(points).all():
        raise ValueError(f"points: got shape {points.shape}, expected a finite [n, D], neither of them 0")
    for name, value, least, most in (
        ("num_clusters", num_clusters, 1, len(points)),
        ("seed", seed, 0, None),
        ("restarts", restarts, 1, _MAX_RESTARTS),
    ):
        integer = as_integer(value)
        if integer is None:
            raise TypeError(f"{name}: got {type(value).__name__}, expected an integer")
        if integer < least or (most is not None and integer > most):
            raise ValueError(f"{name}: got {value}, expected {f'>= {least}' if most is None else f'{least}..{most}'}")
    num_clusters, seed, restarts = map(operator.index, (num_clusters, seed, restarts))
    # squares leave the range of float32 long before the points do; a power of two changes no digit
    largest = float(np.abs(points).max())
    points = np.ldexp(points, -math.frexp(largest)[1]).astype(np.float32) if largest else points.astype(np.float32)
    # expanded squares cancel badly far from the origin
    points = points - points.mean(axis=0)
    random = np.random.default_rng(seed)
    found = [_lloyd(points, _seeds(points, num_clusters, random)) for _ in range(restarts)]
    return min(found, key=lambda result: result[1])[0]


def _seeds(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, D]: each further centre is a point drawn with probability by its squared distance to the nearest one."""
    chosen = [int(random.integers(len(points)))]
    nearest = np.full(len(points), np.inf, dtype=np.float64)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1, dtype=np.float64))
        total = nearest.sum()
        weights = nearest / total if total > 0 else None  # all points coincide: any will do
        chosen.append(int(random.choice(len(points), p=weights)))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """-> clusters [n], inertia (sum of squared distances to the own centre)."""
    clusters, distances = _nearest(points, centres)
    for _ in range(_MAX_ITERATIONS):
        centres = centres.copy()
        for cluster in range(len(centres)):
            mine = points[clusters == cluster]
            # an empty one takes the point that is farthest from its centre
            centres[cluster] = mine.mean(axis=0) if len(mine) else points[distances.argmax()]
        before = clusters
        clusters, distances = _nearest(points, centres)
        if np.array_equal(clusters, before):
            break
    return clusters, float(distances.sum(dtype=np.float64))


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each point and its squared distance, both [n]."""
    clusters = np.empty(len(points), dtype=np.int64)
    distances = np.empty(len(points), dtype=np.float32)
    size = max(1, _CHUNK // len(centres))
    squares = (centres**2).sum(1)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found = (part**2).sum(1, keepdims=True) - 2 * part @ centres.T + squares
        clusters[start : start + size] = found.argmin(1)
        distances[start : start + size] = found.min(1).clip(min=0)
    return clusters, distances
