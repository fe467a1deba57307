"""Clustering quality of embeddings: k-means, and the V-measure of its clusters against labels.

As MTEB scores clustering tasks (k-means with as many clusters as labels, V-measure), without scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_ITERATIONS = 100
_CHUNK = 1 << 22  # distances held at once, in numbers


def v_measure(labels: Sequence[Any], clusters: Sequence[Any]) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007): 0..1, symmetric.

    Args:
        labels, clusters: n hashable values each; only which ones are equal counts.

    Raises:
        ValueError: empty, or of different lengths.
    """
    if len(labels) != len(clusters) or not len(labels):
        raise ValueError(f"labels and clusters: got {len(labels)} and {len(clusters)} values, expected the same n >= 1")
    rows, columns = _codes(labels), _codes(clusters)
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))
    of_labels, of_clusters, of_both = _entropy(joint.sum(1)), _entropy(joint.sum(0)), _entropy(joint)
    mutual = max(0.0, of_labels + of_clusters - of_both)
    # one label (cluster) only: every clustering is homogeneous (complete)
    homogeneity = mutual / of_labels if of_labels else 1.0
    completeness = mutual / of_clusters if of_clusters else 1.0
    total = homogeneity + completeness
    return float(2 * homogeneity * completeness / total) if total else 0.0


def _codes(values: Sequence[Any]) -> np.ndarray:
    """Each value's number in the order of first occurrence."""
    codes: dict[Any, int] = {}
    return np.array([codes.setdefault(value, len(codes)) for value in values])


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum()) if len(shares) > 1 else 0.0


def kmeans(points: np.ndarray, num_clusters: int, *, seed: int, restarts: int = 4) -> np.ndarray:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007), the best of `restarts` by inertia.

    Args:
        points: [n, D], any float dtype; computed in float32.
        num_clusters: 1..n.
        seed: the same one gives the same clusters.

    Returns:
        [n] int64 cluster numbers, below `num_clusters`; a cluster may be empty where points coincide.

    Raises:
        ValueError: wrong shape, NaN or inf, `num_clusters` or `restarts` out of range.
    """
    points = np.asarray(points, dtype=np.float32)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"points: got shape {points.shape}, expected a finite [n, D]")
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"num_clusters: got {num_clusters}, expected 1..{len(points)}")
    if restarts < 1:
        raise ValueError(f"restarts: got {restarts}, expected >= 1")
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
