"""Retrieval out of rows: which documents are ranked for a query, and under which instruction."""

from __future__ import annotations

import pytest

from gircse import GIRCSE, GircseConfig
from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.evaluation.retrieval import evaluate_retrieval
from tests.tiny_models import tiny_model, tiny_tokenizer

WORDS = ["red", "blue", "fox", "dog", "tree", "sea"]
# every text is a query and a document, of the pairs that are given either way round
PAIRS = [(a, b) for a, b in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)]


@pytest.fixture(scope="module")
def model() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=2)).eval()


@pytest.mark.parametrize("instruction", ["find what is similar", ""])
def test_a_text_is_not_ranked_against_itself(model, instruction):
    task = RetrievalTask.from_rows([Row(instruction, a, (b,)) for a, b in PAIRS])
    assert task.own_documents == [{task.documents.index(query)} for query in task.queries]
    embeddings = dict(zip(WORDS, model.encode(WORDS, instruction=instruction, max_length=512), strict=True))
    ranks = []
    for query, answer in PAIRS:
        similar = {text: embeddings[query] @ embeddings[text] for text in WORDS if text != query}
        ranks.append(sorted(similar, key=similar.__getitem__, reverse=True).index(answer) + 1)
    found = evaluate_retrieval(model, task, steps=[2])[2]
    assert found["mrr@10"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert found["success@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks))


def test_a_query_that_is_its_own_answer_stays():
    task = RetrievalTask.from_rows([Row("similar", "a", ("a", "b")), Row("similar", "b", ("a",))])
    assert task.documents == ["a", "b"]
    assert task.own_documents == [set(), {1}]
    copies = RetrievalTask("similar", ["a"], ["a", "b", "a"], [{1}])
    assert copies.own_documents == [{0, 2}]


def test_in_retrieval_a_query_is_written_otherwise_than_a_document():
    task = RetrievalTask.from_rows([Row("retrieve what answers", a, (b,)) for a, b in PAIRS])
    assert task.own_documents == [set()] * len(PAIRS)
