"""The benchmark of Jacobi decoding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import jacobi
from bench.blocks_engine import quality, speed
from bench.documents import Results
from bench.jacobi import main
from bench.jacobi_quality import LENGTH, STARTS, measure, measure_starts
from bench.quality_corpora import StudyCorpus
from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["soft tokens", "a", "the quick fox", "two words"]
CORPUS = StudyCorpus("code", "Find", [], TEXTS, TEXTS, [0, 1, 2, 3], ["x"] * 4, [])


def test_every_start_ends_at_the_sequential_embedding_and_the_page_shows_them(tmp_path):
    model = GIRCSE(tiny_model("qwen3"), tiny_tokenizer()).eval()
    starts = list(measure_starts(model, TEXTS, 4))
    assert {point["start"] for point in starts} == STARTS.keys()
    for name in ("d_1 everywhere", "two single steps", "extrapolated"):
        errors = [point["largest"] for point in starts if point["start"] == name]
        assert abs(errors[-1]) <= 1e-6 < errors[0]

    def encode(num_steps, **options):
        shared = {"max_length": LENGTH, "num_steps": num_steps} | options
        return np.concatenate([model.encode(TEXTS, instruction=what, **shared) for what in ("Find", None)])

    points = list(measure(model, CORPUS, [2, 9], [1e-3, 1e-4]))
    exact, last = next(point for point in points if point["num_steps"] == 9), points[-1]
    assert [exact.get("passes"), last["num_steps"], last["tolerance"], last["ndcg"]] == [None, 9, 1e-4, exact["ndcg"]]
    assert all(point["largest"] > 1e-5 for point in points if point.get("after") == 1)
    for point in points:  # each as the engine has it with that K and tolerance
        if "tolerance" in point:
            with model.inference() as engine:
                before = engine.report().passes
                found = encode(point["num_steps"], decoding="jacobi", jacobi_tolerance=point["tolerance"])
                passes = {taken: texts - before.get(taken, 0) for taken, texts in engine.report().passes.items()}
            assert point["passes"] == sum(taken * texts for taken, texts in passes.items()) / len(found)
            assert point["most_passes"] == max(taken for taken, texts in passes.items() if texts)
            error = 1 - (found * encode(point["num_steps"])).sum(-1)
            assert point["largest"] == pytest.approx(error.max(), abs=1e-6)

    what = {"model": "code-0", "corpus": "code"}
    record = {"benchmark": "jacobi", "kind": "quality", "dtype": "float32"}
    record |= {name: [what | point for point in found] for name, found in (("points", points), ("starts", starts))}
    names = ("driver", "device", "threads", "torch", "triton", "transformers", "date", "commit", "command", "sources")
    record["provenance"] = dict.fromkeys(names, "1") | {"driver": None}
    (tmp_path / "jacobi.json").write_text(json.dumps(record))
    results = Results(tmp_path)
    page = quality(results)
    assert "| two single steps | 3 |" in page
    assert "| code | 9 | sequential |" in page
    assert "| code | 9 | 2 passes | 2.0 |" in page
    assert results.figures["jacobi"].panels[0].series[0].label == "code: code-0"
    assert speed(results).startswith("no record yet")


def test_speed_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(jacobi, "random_model", lambda *_, **__: tiny_model("llama"))
    out = tmp_path / "record.json"
    small = ["--rows", "1", "--length", "4", "--steps", "3", "--repeats", "1", "--out", str(out)]
    assert main(["speed", "--shape", "smollm2-135m", "--tolerances", "2", "0", *small]) == 0
    record = json.loads(out.read_text())
    assert [point["passes"] for point in record["points"]] == [2, 3]
    assert all(point["seconds"] > 0 < point["sequential_seconds"] for point in record["points"])
