from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gircse.evaluation import metrics
from gircse.evaluation.metrics import metrics_by_step, relevant_ranks, retrieval_metrics


def plain(queries, docs, relevant, k):
    """The definitions, written out: sort the documents, irrelevant ones first in a tie, and read the places off."""
    sums = {f"ndcg@{k}": 0.0, f"mrr@{k}": 0.0, f"recall@{k}": 0.0, "recall@1": 0.0, "success@1": 0.0}
    for query, wanted in zip(queries, relevant, strict=True):
        scores = [
            round(float(np.dot(query, doc) / np.linalg.norm(query) / max(np.linalg.norm(doc), 1e-30)), 9)
            for doc in docs
        ]
        order = sorted(range(len(docs)), key=lambda d: (-scores[d], d in wanted))
        hits = [place for place, d in enumerate(order, start=1) if d in wanted]
        ideal = sum(1 / math.log2(i + 1) for i in range(1, min(k, len(wanted)) + 1))
        sums[f"ndcg@{k}"] += sum(1 / math.log2(h + 1) for h in hits if h <= k) / ideal
        sums[f"mrr@{k}"] += 1 / hits[0] if hits[0] <= k else 0
        sums[f"recall@{k}"] += sum(h <= k for h in hits) / len(wanted)
        if k > 1:  # else it is recall@k
            sums["recall@1"] += (hits[0] == 1) / len(wanted)
        sums["success@1"] += hits[0] == 1
    return {name: value / len(queries) for name, value in sums.items()}


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("copies", [1, 4])  # with copies, most scores tie exactly
def test_equals_the_plain_implementation(k, copies, monkeypatch):
    rng = np.random.default_rng(k)
    queries = rng.standard_normal((37, 12))
    docs = np.repeat(rng.standard_normal((60 // copies, 12)), copies, axis=0)
    relevant = [set(rng.choice(60, size=rng.integers(1, 6), replace=False).tolist()) for _ in range(37)]
    expected = plain(queries, docs, relevant, k)
    whole = retrieval_metrics(queries, docs, relevant, k)
    assert whole == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(metrics, "_CHUNK", 7)  # many chunks, the last ones ragged
    assert retrieval_metrics(queries, docs, relevant, k) == whole
    assert retrieval_metrics(torch.tensor(queries).float(), docs, relevant, k) == pytest.approx(expected, abs=1e-12)


def test_single_indices_and_scaling_do_not_matter():
    rng = np.random.default_rng(0)
    queries, docs = rng.standard_normal((20, 8)), rng.standard_normal((50, 8))
    wanted = rng.integers(0, 50, 20)
    sets = retrieval_metrics(queries, docs, [{int(w)} for w in wanted])
    scaled = docs * rng.uniform(0.1, 9, (50, 1))
    assert retrieval_metrics(queries * 3, scaled, wanted) == pytest.approx(sets)
    assert retrieval_metrics(queries, docs, torch.tensor(wanted)) == sets
    assert sets["success@1"] == sets["recall@1"]
    best = retrieval_metrics(docs[wanted], docs, wanted)
    assert set(best.values()) == {1.0}


@pytest.mark.parametrize("width", [1, 64, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_collapsed_embeddings_score_nothing(width, dtype):
    torch.manual_seed(0)
    same = torch.randn(1, width).to(dtype)
    result = retrieval_metrics(same.expand(7, -1), same.expand(333, -1), [{i} for i in range(7)])
    assert set(result.values()) == {0.0}
    zeros = retrieval_metrics(torch.zeros(7, width), torch.zeros(333, width), [{i} for i in range(7)])
    assert set(zeros.values()) == {0.0}


def test_ranks_of_a_tie_run_backwards_from_its_end():
    docs = np.array([[1.0, 0], [0, 1], [0, 1], [0, 1], [-1, 0]])
    assert relevant_ranks(np.array([[0.0, 1]]), docs, [{1, 2}]) == [[2, 3]]
    assert relevant_ranks(np.array([[0.0, 1]]), docs, [{1, 4}]) == [[3, 5]]
    assert relevant_ranks(np.array([[0.0, 1]]), docs, [set(range(5))]) == [[1, 2, 3, 4, 5]]


def test_by_step_takes_the_prefixes():
    rng = np.random.default_rng(1)
    queries, docs = (
        rng.standard_normal((9, 5, 6)).astype(np.float32),
        rng.standard_normal((30, 5, 6)).astype(np.float32),
    )
    wanted = list(range(9))
    table = metrics_by_step(queries, docs, wanted, steps=(1, 5, 2), k=3)
    assert list(table) == [1, 5, 2]
    for step, result in table.items():
        assert result == retrieval_metrics(queries[:, step - 1], docs[:, step - 1], wanted, 3)
    assert list(metrics_by_step(queries, docs, wanted)) == [1, 2, 3, 4, 5]


def test_excluded_documents_are_as_if_they_were_not_there():
    rng = np.random.default_rng(2)
    queries, docs = rng.standard_normal((1100, 4)), rng.standard_normal((40, 4))
    wanted = [{i % 20, (7 * i + 1) % 20} for i in range(1100)]
    left_out = [{20 + i % 11, 20 + i % 7} - {20} for i in range(1100)]
    found = relevant_ranks(queries, docs, wanted, excluded=left_out)
    for i in (0, 1, 5, 1023, 1024, 1099):
        kept = [d for d in range(40) if d not in left_out[i]]  # relevant ones keep their places: they come first
        assert relevant_ranks(queries[i : i + 1], docs[kept], [wanted[i]])[0] == found[i]
    assert found != relevant_ranks(queries, docs, wanted)
    steps = metrics_by_step(queries[:, None], docs[:, None], wanted, excluded=left_out)
    assert steps[1] == retrieval_metrics(queries, docs, wanted, excluded=left_out)
    for excluded, message in (
        ([{0}] * 1100, r"excluded\[0\] must hold no relevant document, got 0"),
        ([{40}] * 1100, r"excluded\[0\] must lie in 0..39"),
        ([set()], r"excluded must have one entry per query \(1100\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            relevant_ranks(queries, docs, wanted, excluded=excluded)


def test_wrong_arguments_are_named():
    q, d = np.ones((2, 3)), np.ones((4, 3))
    cases = [
        ((q[0], d, [0]), "query_emb must have 2"),
        ((q, d[:0], [0, 0]), "doc_emb must have 2 non-empty"),
        ((q, d[:, :2], [0, 1]), "same width, got 3 and 2"),
        ((q, d, [0]), r"one entry per query \(2\), got 1"),
        ((q, d, [set(), {1}]), r"relevant\[0\] is empty"),
        ((q, d, [{0}, {4}]), r"relevant\[1\] must lie in 0..3"),
        ((q, d, [{-1}, {2}]), r"relevant\[0\] must lie in 0..3"),
        ((q * np.nan, d, [0, 1]), "query_emb has NaN"),
        ((q.astype(int), d, [0, 1]), "query_emb must be floating point"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            retrieval_metrics(*arguments)
    with pytest.raises(ValueError, match="k must be at least 1"):
        retrieval_metrics(q, d, [0, 1], 0)
    with pytest.raises(ValueError, match=r"steps must lie in 1..3, got 4"):
        metrics_by_step(np.ones((2, 3, 3)), np.ones((4, 3, 3)), [0, 1], steps=[4])
    with pytest.raises(ValueError, match="same steps and width"):
        metrics_by_step(np.ones((2, 3, 3)), np.ones((4, 2, 3)), [0, 1])
