"""k-means and V-measure against published values and constructed data."""

from __future__ import annotations

import numpy as np
import pytest

from gircse.analysis.clustering import kmeans, v_measure


@pytest.mark.parametrize(
    ("labels", "clusters", "expected"),
    [
        # the examples in the documentation of scikit-learn's v_measure_score
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 2], [0, 0, 1, 1], 0.8),
        ([0, 1, 2, 3], [0, 0, 1, 1], 2 / 3),
        ([0, 0, 1, 1], [0, 0, 1, 2], 0.8),
        ([0, 0, 1, 1], [0, 1, 2, 3], 2 / 3),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 1, 1], [0, 0, 0, 0], 0.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),
        (["a"], ["b"], 1.0),
    ],
)
def test_v_measure_of_known_clusterings(labels, clusters, expected):
    assert v_measure(labels, clusters) == pytest.approx(expected, abs=1e-12)


def test_v_measure_is_the_formula_of_the_contingency_table():
    random = np.random.default_rng(0)
    labels, clusters = random.integers(0, 5, 300), random.integers(0, 7, 300)
    table = np.histogram2d(labels, clusters, bins=(5, 7))[0] / 300
    mutual = sum(p * np.log(p / (table[i].sum() * table[:, j].sum())) for (i, j), p in np.ndenumerate(table) if p > 0)
    entropies = [-(m * np.log(m)).sum() for m in (table.sum(1), table.sum(0))]
    assert v_measure(labels.tolist(), clusters.tolist()) == pytest.approx(2 * mutual / sum(entropies), rel=1e-9)


def test_kmeans_finds_separated_groups_and_repeats():
    random = np.random.default_rng(1)
    centres = random.normal(size=(6, 8)) * 10 + 1000  # far from the origin, where expanded squares cancel
    labels = np.repeat(np.arange(6), 50)
    points = centres[labels] + random.normal(size=(300, 8))
    clusters = kmeans(points, 6, seed=0)
    assert v_measure(labels.tolist(), clusters.tolist()) == 1.0
    np.testing.assert_array_equal(clusters, kmeans(points, 6, seed=0))


def test_kmeans_reaches_the_inertia_of_scipy():
    vq = pytest.importorskip("scipy.cluster.vq")
    points = np.random.default_rng(2).normal(size=(400, 5))
    clusters = kmeans(points, 8, seed=0, restarts=10)
    ours = sum(((points[clusters == c] - points[clusters == c].mean(0)) ** 2).sum() for c in range(8))
    theirs = min(
        (((points - centres[found]) ** 2).sum())
        for centres, found in (vq.kmeans2(points, 8, minit="++", iter=100, seed=seed) for seed in range(10))
    )
    assert ours <= 1.02 * theirs


def test_kmeans_of_points_that_coincide_and_of_single_points():
    assert set(kmeans(np.ones((5, 3)), 3, seed=0)) <= {0, 1, 2}
    assert sorted(kmeans(np.eye(4), 4, seed=0)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("points", "count", "restarts", "message"),
    [
        (np.ones(3), 1, 1, r"points: got shape \(3,\)"),
        (np.array([[np.nan, 1]]), 1, 1, "points: got shape"),
        (np.ones((3, 2)), 4, 1, r"num_clusters: got 4, expected 1\.\.3"),
        (np.ones((3, 2)), 2, 0, "restarts: got 0"),
    ],
)
def test_kmeans_names_what_is_wrong(points, count, restarts, message):
    with pytest.raises(ValueError, match=message):
        kmeans(points, count, seed=0, restarts=restarts)


def test_v_measure_refuses_different_lengths():
    with pytest.raises(ValueError, match="got 2 and 3 values"):
        v_measure([1, 2], [1, 2, 3])
