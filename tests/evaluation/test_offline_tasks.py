from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("mteb")

from gircse.evaluation.offline_tasks import (
    StdlibAreaClassification,
    StdlibCodeReranking,
    StdlibCodeRetrieval,
    StdlibPairClassification,
    StdlibRelatednessSTS,
    offline_benchmark,
)
from gircse.evaluation.stdlib_text import REVISION, function_texts


def loaded(kind):
    task = kind()
    task.load_data()
    return task.dataset


def test_the_data_are_the_same_each_time():
    for task, again in zip(offline_benchmark().tasks, offline_benchmark().tasks, strict=True):
        task.load_data()
        again.load_data()
        data = task.dataset["default"]["test"]["corpus"] if "default" in task.dataset else task.dataset["test"]
        other = again.dataset["default"]["test"]["corpus"] if "default" in again.dataset else again.dataset["test"]
        assert data.to_dict() == other.to_dict()
        assert task.metadata.dataset["revision"] == REVISION
        task.unload_data()
        assert not task.data_loaded


@pytest.mark.parametrize("kind", [StdlibCodeRetrieval, StdlibCodeReranking])
def test_rankings_hold_their_answer_and_no_position_gives_it_away(kind):
    data = loaded(kind)["default"]["test"]
    documents = dict(zip(data["corpus"]["id"], data["corpus"]["text"], strict=True))
    codes = {text.summary: text.code for text in function_texts()}
    places = []
    for name, text in zip(data["queries"]["id"], data["queries"]["text"], strict=True):
        (relevant,) = data["relevant_docs"][name]
        assert documents[relevant] == codes[text]
        candidates = list(documents) if data["top_ranked"] is None else data["top_ranked"][name]
        places.append(candidates.index(relevant) / len(candidates))
        assert len(set(candidates)) == len(candidates) >= 8
    assert abs(np.mean(places) - 0.5) < 0.15
    assert np.corrcoef(places, range(len(places)))[0, 1] < 0.5


def test_classes_are_balanced_and_apart():
    data = loaded(StdlibAreaClassification)
    for part in ("train", "test"):
        assert set(Counter(data[part]["label"]).values()) == {12}
    assert not set(data["train"]["text"]) & set(data["test"]["text"])


def test_pairs():
    data = loaded(StdlibPairClassification)["test"]
    assert sum(data["labels"]) == len(data) / 2
    codes = {text.summary: text.code for text in function_texts()}
    for one, two, label in zip(data["sentence1"], data["sentence2"], data["labels"], strict=True):
        assert (codes[one] == two) == bool(label)


def test_relatedness_is_the_distance_in_the_library():
    data = loaded(StdlibRelatednessSTS)["test"]
    assert Counter(data["score"]) == {0.0: 30, 1.0: 30, 2.0: 30, 3.0: 30}
    texts = {text.summary: text for text in function_texts()}
    for one, two, score in zip(data["sentence1"], data["sentence2"], data["score"], strict=True):
        first, second = texts[one], texts[two]
        assert (first.area == second.area) == (score >= 1)
        assert (first.module == second.module) == (score >= 2)
        assert one != two
