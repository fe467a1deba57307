"""Metrics of embeddings of any size and kind: their plain definition, or an error that names the argument."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse.analysis.clustering import kmeans, v_measure
from gircse.analysis.statistics import paired_difference, plateau
from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation import metrics
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.evaluation.step_store import check_steps
from tests.fuzz.outcome import outcome
from tests.fuzz.profiles import fuzz
from tests.fuzz.tensors import garbage, seeds

SIZES = st.sampled_from([1e-300, 1e-40, 1e-15, 1.0, 1e15, 1e38, 1e300])


def vectors(draw: Any, rows: int, width: int) -> np.ndarray:
    """Small integers (so that cosines tie, exactly), each row at a size of its own; some rows are zero."""
    generator = np.random.default_rng(draw(seeds))
    return generator.integers(-1, 2, (rows, width)).astype(np.float64)


def exact_ranks(queries: np.ndarray, docs: np.ndarray, relevant: list[set[int]]) -> list[list[int]]:
    """By exact arithmetic: sign and square of each cosine are fractions."""

    def cosine(a: np.ndarray, b: np.ndarray) -> Fraction:
        dot, norms = int(a @ b), int(a @ a) * int(b @ b)
        return Fraction(dot * abs(dot), norms) if norms else Fraction(0)

    ranks = []
    for query, wanted in zip(queries, relevant, strict=True):
        scores = [cosine(query, doc) for doc in docs]
        ordered = sorted(range(len(docs)), key=lambda d: (-scores[d], d in wanted))  # ties count against the model
        ranks.append([place for place, d in enumerate(ordered, start=1) if d in wanted])
    return ranks


@fuzz(60)
@given(data=st.data())
def test_ranks(data):
    num_queries, num_docs, width = (data.draw(st.integers(1, 5)) for _ in range(3))
    queries, docs = vectors(data.draw, num_queries, width), vectors(data.draw, num_docs, width)
    some = st.sets(st.integers(0, num_docs - 1), min_size=1)
    relevant = data.draw(st.lists(some, min_size=num_queries, max_size=num_queries))
    scaled = [m * np.array([[data.draw(SIZES)] for _ in m]) for m in (queries, docs)]
    found = metrics.relevant_ranks(*scaled, relevant)
    expected = exact_ranks(queries, docs, relevant)
    assert found == expected
    k = data.draw(st.integers(1, 6))
    scores = metrics.retrieval_metrics(*scaled, relevant, k)
    mean = lambda values: sum(values) / num_queries  # noqa: E731
    assert math.isclose(scores[f"mrr@{k}"], mean([1 / row[0] if row[0] <= k else 0 for row in expected]))
    assert math.isclose(scores[f"recall@{k}"], mean([sum(r <= k for r in row) / len(row) for row in expected]))
    assert all(0 <= value <= 1 + 1e-12 for value in scores.values())
    by_step = metrics.metrics_by_step(scaled[0][:, None], scaled[1][:, None], relevant, k=k)
    assert by_step == {1: scores}


@fuzz(60)
@given(data=st.data())
def test_kmeans(data):
    count, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    points = vectors(data.draw, count, width) * data.draw(SIZES)
    points = points.astype(data.draw(st.sampled_from([np.float64, np.int64]))) if np.abs(points).max() < 9 else points
    clusters = data.draw(st.integers(1, count))
    seed = data.draw(st.integers(0, 2**40))
    found = kmeans(points, clusters, seed=seed)
    assert found.shape == (count,)
    assert found.dtype == np.int64
    assert found.min() >= 0
    assert found.max() < clusters
    distinct = np.unique(points, axis=0)
    if clusters >= len(distinct):  # enough for every point: then equal points, and only they, are together
        together = (points[:, None] == points[None]).all(-1)
        np.testing.assert_array_equal(found[:, None] == found[None], together)
    np.testing.assert_array_equal(kmeans(points, clusters, seed=seed), found)


labels = st.lists(st.sampled_from(["a", "b", 1, None, (), 2.5]), min_size=1, max_size=12)


@fuzz(60)
@given(data=st.data())
def test_v_measure(data):
    first = data.draw(labels)
    second = data.draw(st.lists(st.integers(0, 3), min_size=len(first), max_size=len(first)))
    value = v_measure(first, second)
    assert 0 <= value <= 1
    assert math.isclose(value, v_measure(second, first))
    sklearn = pytest.importorskip("sklearn.metrics")
    names = [str(label) for label in first]
    assert math.isclose(value, sklearn.v_measure_score(names, second), abs_tol=1e-9)


@fuzz(40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), seeds)
def test_paired(first, seed):
    ours, theirs = np.array(first), np.random.default_rng(seed).random(len(first))
    found = paired_difference(ours, theirs)
    assert math.isclose(found["mean"], ours.mean() - theirs.mean(), abs_tol=1e-12)
    assert found["standard_error"] >= 0
    best, smallest = plateau({5: ours, 1: theirs})
    assert best == (5 if ours.mean() >= theirs.mean() else 1)
    assert smallest <= best


POINTS = np.eye(4, dtype=np.float32)
CALLS: dict[Any, dict[str, Any]] = {
    metrics.relevant_ranks: {"query_emb": POINTS, "doc_emb": POINTS, "relevant": [0, 1, 2, 3]},
    metrics.retrieval_metrics: {"query_emb": POINTS, "doc_emb": POINTS, "relevant": [{0}, {1}, {2}, {3}], "k": 3},
    metrics.metrics_by_step: {"query_steps": POINTS[:, None], "doc_steps": POINTS[:, None], "relevant": [0, 1, 2, 3]},
    kmeans: {"points": POINTS, "num_clusters": 2, "seed": 0},
    v_measure: {"labels": [1, 2], "clusters": [1, 2]},
    paired_difference: {"ours": POINTS[0], "theirs": POINTS[1]},
    plateau: {"per_query": {1: POINTS[0]}},
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@fuzz(40)
@given(data=st.data())
def test_an_error_names_the_argument(call, data):
    arguments = dict(CALLS[call])
    names = list(inspect.signature(call).parameters)
    arguments[data.draw(st.sampled_from(names))] = data.draw(garbage)
    _, error = outcome(lambda: call(**arguments), TypeError, ValueError)
    assert error is None or any(str(error).startswith(name) for name in names)


@fuzz(30)
@given(steps=garbage | st.lists(garbage, min_size=1, max_size=2))
def test_numbers_of_steps(steps):
    """Refused before a model is asked for anything."""
    task = RetrievalTask(None, ["a"], ["b"], [{0}])
    for call in (lambda: evaluate_retrieval(None, task, steps=steps), lambda: check_steps(steps)):
        _, error = outcome(call, ValueError, AttributeError)  # an AttributeError of None: the steps are good
        good = isinstance(steps, list) and all(type(k) is int and k >= 0 for k in steps)
        assert (isinstance(error, ValueError) and str(error).startswith("steps: got")) or good
