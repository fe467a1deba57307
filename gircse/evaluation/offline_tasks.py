"""Six small mteb tasks that need no download: their text is the standard library of the running Python.

They are real tasks (with mteb's classes, metrics and JSON), one of each frequent kind of MTEB(eng, v2), for smoke tests
and for comparing checkpoints on a machine without a network. Their scores say nothing about MTEB(eng, v2).
"""

from __future__ import annotations

import random
from typing import Any

from gircse.evaluation import require
from gircse.evaluation.stdlib_text import REVISION, FunctionText, draw, function_texts

require("mteb")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTask  # noqa: E402
from mteb.abstasks.classification import AbsTaskClassification  # noqa: E402
from mteb.abstasks.clustering import AbsTaskClustering  # noqa: E402
from mteb.abstasks.pair_classification import AbsTaskPairClassification  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.benchmarks.benchmark import Benchmark  # noqa: E402

OFFLINE = "offline"  # the name of the benchmark that has all six


class _Local(AbsTask):
    """A task that builds its data instead of downloading them."""

    data_loaded: bool

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.dataset = self.build()
            self.data_loaded = True

    def build(self) -> Any:
        raise NotImplementedError


def _metadata(name: str, type: str, score: str, prompt: str | dict[str, str], description: str) -> TaskMetadata:
    values: dict[str, Any] = {
        "dataset": {"path": "gircse/python-standard-library", "revision": REVISION},
        "name": name,
        "description": description,
        "prompt": prompt,
        "type": type,
        "category": "t2c" if type in ("Classification", "Clustering") else "t2t",
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": score,
        "domains": ["Programming", "Written"],
        "task_subtypes": [],
        "license": "https://docs.python.org/3/license.html",
        "annotations_creators": "derived",
        "dialect": [],
        "sample_creation": "found",
        "bibtex_citation": "",
    }
    return TaskMetadata(**values)


_TO_CODE = {"query": "Given a description of what a function does, retrieve its code"}
_AREA = "Identify the area of the standard library that a function's description belongs to"


class StdlibCodeRetrieval(_Local, AbsTaskRetrieval):
    """60 descriptions, 180 functions."""

    metadata = _metadata(
        "StdlibCodeRetrieval",
        "Retrieval",
        "ndcg_at_10",
        _TO_CODE,
        "Find a function of Python's standard library, its name masked, by the first paragraph of its docstring.",
    )

    def build(self) -> Any:
        texts = draw(function_texts(), 180, seed=1)
        return {"default": {"test": _ranking(texts[:60], texts, None)}}


class StdlibCodeReranking(_Local, AbsTaskRetrieval):
    """40 descriptions, each with its own and 7 other functions of the same area."""

    metadata = _metadata(
        "StdlibCodeReranking",
        "Reranking",
        "map_at_1000",
        _TO_CODE,
        "Rank eight functions of one area of Python's standard library by the description of one of them.",
    )

    def build(self) -> Any:
        texts = draw(function_texts(), 320, seed=2)
        queries = texts[:40]
        candidates = [
            [query, *draw([t for t in texts if t.area == query.area and t != query], 7, seed=n)]
            for n, query in enumerate(queries)
        ]
        return {"default": {"test": _ranking(queries, texts, candidates)}}


class StdlibAreaClassification(_Local, AbsTaskClassification):
    """Eight areas, with 12 texts of each for training and 12 others for the test."""

    metadata = _metadata(
        "StdlibAreaClassification",
        "Classification",
        "accuracy",
        _AREA,
        "Tell the area (e-mail, web, ..) of Python's standard library from the description of a function.",
    )

    def build(self) -> Any:
        train, test = [], []
        for texts in _by_area(24, seed=3).values():
            train += texts[:12]
            test += texts[12:]
        return DatasetDict({"train": _labelled(train, "text", "label"), "test": _labelled(test, "text", "label")})


class StdlibAreaClustering(_Local, AbsTaskClustering):
    """Eight areas of 20 texts."""

    max_fraction_of_documents_to_embed = None
    max_documents_per_cluster = 128

    metadata = _metadata(
        "StdlibAreaClustering",
        "Clustering",
        "v_measure",
        _AREA,
        "Group descriptions of functions by the area of Python's standard library that they come from.",
    )

    def build(self) -> Any:
        texts = [text for texts in _by_area(20, seed=4).values() for text in texts]
        return DatasetDict({"test": _labelled(texts, "sentences", "labels")})


class StdlibPairClassification(_Local, AbsTaskPairClassification):
    """100 pairs of a description and a function of the same area. In every second pair the two belong together."""

    metadata = _metadata(
        "StdlibPairClassification",
        "PairClassification",
        "max_ap",
        "Represent what a function does, for a semantic comparison of descriptions and code",
        "Tell whether a description and a masked function of Python's standard library belong together.",
    )

    def build(self) -> Any:
        texts = draw(function_texts(), 400, seed=5)
        pairs = []
        for number, text in enumerate(texts[:100]):
            others = [t for t in texts[100:] if t.area == text.area]
            pairs.append((text, text if number % 2 else draw(others, 1, seed=number)[0]))
        columns = {
            "sentence1": [first.summary for first, _ in pairs],
            "sentence2": [second.code for _, second in pairs],
            "labels": [int(first == second) for first, second in pairs],
        }
        return DatasetDict({"test": Dataset.from_dict(columns)})


class StdlibRelatednessSTS(_Local, AbsTaskSTS):
    """120 pairs of descriptions, scored 0 to 3 by how near their functions lie to each other."""

    min_score = 0
    max_score = 3

    metadata = _metadata(
        "StdlibRelatednessSTS",
        "STS",
        "cosine_spearman",
        "Retrieve semantically similar descriptions of functions",
        "How related two functions are, by their descriptions: 3 = one module and the same kind of action, 2 = one "
        "module, 1 = one area, 0 = different areas of Python's standard library.",
    )

    def build(self) -> Any:
        texts = [text for text in draw(function_texts(), 10_000, seed=6) if text.action]
        rng = random.Random(6)
        rows: list[tuple[str, str, float]] = []
        for score in range(4):
            while len(rows) < 30 * (score + 1):
                first = rng.choice(texts)
                others = [other for other in texts if other != first and _relatedness(first, other) == score]
                if others:
                    rows.append((first.summary, rng.choice(others).summary, float(score)))
        columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*rows, strict=True)), strict=True))
        return DatasetDict({"test": Dataset.from_dict(columns)})


def offline_benchmark() -> Benchmark:
    """A benchmark of new instances of the six tasks."""
    kinds: tuple[type[AbsTask], ...] = (StdlibCodeRetrieval, StdlibCodeReranking, StdlibAreaClassification)
    kinds += (StdlibAreaClustering, StdlibPairClassification, StdlibRelatednessSTS)
    description = "Tasks over Python's standard library, without a download."
    return Benchmark(name=OFFLINE, tasks=[kind() for kind in kinds], description=description)


def _relatedness(first: FunctionText, second: FunctionText) -> int:
    if first.area != second.area:
        return 0
    if first.module != second.module:
        return 1
    return 3 if first.action == second.action else 2


def _by_area(count: int, seed: int) -> dict[str, list[FunctionText]]:
    areas: dict[str, list[FunctionText]] = {}
    for text in function_texts():
        areas.setdefault(text.area, []).append(text)
    return {area: draw(texts, count, seed) for area, texts in areas.items()}


def _labelled(texts: list[FunctionText], text_column: str, label_column: str) -> Dataset:
    names = sorted({text.area for text in texts})
    texts = draw(texts, len(texts), seed=7)  # otherwise one area would follow the other
    return Dataset.from_dict(
        {text_column: [t.summary for t in texts], label_column: [names.index(t.area) for t in texts]}
    )


def _ranking(
    queries: list[FunctionText], documents: list[FunctionText], candidates: list[list[FunctionText]] | None
) -> RetrievalSplitData:
    """Ranking data in which each query's own function is the relevant document. Documents are in another order than
    queries."""
    documents = draw(documents, len(documents), seed=8)
    names = {text: f"d{number}" for number, text in enumerate(documents)}
    return RetrievalSplitData(
        queries=Dataset.from_dict({"id": [f"q{n}" for n in range(len(queries))], "text": [q.summary for q in queries]}),
        corpus=Dataset.from_dict({"id": list(names.values()), "text": [d.code for d in documents]}),
        relevant_docs={f"q{n}": {names[query]: 1} for n, query in enumerate(queries)},
        top_ranked=None
        if candidates is None
        else {f"q{n}": [names[text] for text in draw(row, len(row), seed=-1 - n)] for n, row in enumerate(candidates)},
    )
