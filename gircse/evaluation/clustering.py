"""Clustering quality of embeddings: k-means, and the V-measure of its clusters against labels.

MTEB scores clustering tasks in this way, with as many clusters as labels, but by scikit-learn, which is an extra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gircse.evaluation.metrics import finite_tensor
from gircse.integers import check_integer

_MAX_ITERATIONS = 100
_MAX_RESTARTS = 1000
_DISTANCES = 1 << 22  # numbers of distances that are held at once


def v_measure(labels: Sequence[Any], clusters: Sequence[Any]) -> float:
    """The harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007), in 0..1 and symmetric.

    Args:
        labels, clusters: n hashable values each. Only which of them are equal counts.

    Raises:
        TypeError: no sequence, or a value that is not hashable.
        ValueError: the sequences are empty, or of different lengths.
    """
    rows, columns = _codes("labels", labels), _codes("clusters", clusters)
    if len(rows) != len(columns) or not len(rows):
        raise ValueError(f"labels and clusters: got {len(rows)} and {len(columns)} values, expected the same n >= 1")
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))
    of_labels, of_clusters, of_both = _entropy(joint.sum(1)), _entropy(joint.sum(0)), _entropy(joint)
    mutual = max(0.0, of_labels + of_clusters - of_both)
    # With one label every clustering is homogeneous; with one cluster it is complete.
    homogeneity = mutual / of_labels if of_labels else 1.0
    completeness = mutual / of_clusters if of_clusters else 1.0
    total = homogeneity + completeness
    return min(1.0, float(2 * homogeneity * completeness / total)) if total else 0.0


def _codes(name: str, values: Sequence[Any]) -> np.ndarray:
    """Each value's number in the order of first occurrence."""
    codes: dict[Any, int] = {}
    try:
        return np.array([codes.setdefault(value, len(codes)) for value in values], dtype=np.int64)
    except (TypeError, RuntimeError, NotImplementedError) as error:  # no iterable, one of lists, or a sparse tensor
        raise TypeError(f"{name}: {error}, expected a sequence of hashable values") from None


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum()) if len(shares) > 1 else 0.0


def kmeans(points: np.ndarray, num_clusters: int, *, seed: int, restarts: int = 4) -> np.ndarray:
    """Lloyd's algorithm from k-means++ centres (Arthur and Vassilvitskii 2007), the best of `restarts` by inertia.

    Args:
        points: [n, D] floating point; computed in float32.
        num_clusters: 1..n.
        seed: >= 0; the same seed gives the same clusters.
        restarts: 1..1000.

    Returns:
        [n] int64 cluster numbers below `num_clusters`. A cluster may be empty if points coincide.

    Raises:
        TypeError: `points` are no numbers.
        ValueError: wrong shape, NaN or infinity; `num_clusters`, `seed` or `restarts` is out of range.
    """
    tensor = finite_tensor("points", points, 2)
    num_clusters = check_integer("num_clusters", num_clusters, least=1, most=len(tensor))
    seed = check_integer("seed", seed, least=0)
    restarts = check_integer("restarts", restarts, least=1, most=_MAX_RESTARTS)
    points = (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()
    # The squares of points leave the range of float32 long before the points do. Scaling by a power of two changes no
    # digit of them.
    points = np.ldexp(points, -math.frexp(float(np.abs(points).max()))[1]).astype(np.float32)
    points = points - points.mean(axis=0)  # the expanded squares of `_nearest` cancel badly far from the origin
    random = np.random.default_rng(seed)
    results = [_lloyd(points, _first_centres(points, num_clusters, random)) for _ in range(restarts)]
    return min(results, key=lambda result: result[1])[0]


def _first_centres(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, D] points. Each after the first is drawn with a probability that grows with its squared distance to the
    nearest centre so far."""
    chosen = [int(random.integers(len(points)))]
    nearest = np.full(len(points), np.inf, dtype=np.float64)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1, dtype=np.float64))
        total = nearest.sum()
        weights = nearest / total if total > 0 else None  # None: all points coincide, and each is as good
        chosen.append(int(random.choice(len(points), p=weights)))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """The clusters [n], and their inertia: the sum of the points' squared distances to their centres."""
    clusters, distances = _nearest(points, centres)
    for _ in range(_MAX_ITERATIONS):
        centres = centres.copy()
        for cluster in range(len(centres)):
            members = points[clusters == cluster]
            # The point that is farthest from its centre becomes the centre of an empty cluster.
            centres[cluster] = members.mean(axis=0) if len(members) else points[distances.argmax()]
        before = clusters
        clusters, distances = _nearest(points, centres)
        if np.array_equal(clusters, before):
            break
    return clusters, float(distances.sum(dtype=np.float64))


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each point and its squared distance, both [n]."""
    clusters = np.empty(len(points), dtype=np.int64)
    distances = np.empty(len(points), dtype=np.float32)
    size = max(1, _DISTANCES // len(centres))
    squares = (centres**2).sum(1)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        squared = (part**2).sum(1, keepdims=True) - 2 * part @ centres.T + squares
        clusters[start : start + size] = squared.argmin(1)
        distances[start : start + size] = squared.min(1).clip(min=0)
    return clusters, distances
