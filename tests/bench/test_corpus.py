"""`bench/run.py --corpus`: what is read, what is compared, and when a speed is marked WRONG."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import corpus, docstrings, run
from bench.agreement import OK, WRONG
from bench.batches import random_batch
from bench.encode_check import check
from bench.engines import ENGINES, GRAPH, NO_REUSE, OFFICIAL_EVAL, REFERENCE
from gircse import GIRCSE, GircseConfig
from gircse.lm.causal_lm import CausalLM
from gircse.ops import l2_normalize
from gircse.roofline import Ceilings, ModelFacts
from tests.plain import plain_rollout
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["one", "a longer text than that", "x", "tides and moons", "and a sixth of them" * 3, "last"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "tiny"
    tiny_model("llama-tied").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model(folder) -> GIRCSE:
    return corpus.load(str(folder), torch.float32, "cpu")


def _job(**changes) -> corpus.CorpusJob:
    return replace(corpus.CorpusJob(TEXTS, "find it", 48, 4), **changes)


def test_both_sides_are_the_definition(model):
    job, stock = _job(), tiny_model("llama-tied")
    official = corpus.encode_official(model, job, 3)
    ours = corpus.encode_ours(model, job, 3)
    for row, text in enumerate(corpus.tokenize(model, job, TEXTS)):
        _, states = plain_rollout(stock, torch.tensor(text), 3)
        expected = l2_normalize(states.mean(dim=0)).detach().numpy()
        assert 1 - official[row] @ expected < 1e-6
        assert 1 - ours[row] @ expected < 1e-6


def test_record_of_a_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: Ceilings(1e11, 1e10))
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["--model", str(folder), "--corpus", str(file), "--instruction", "find it", "--steps", "0", "2"]
    out = tmp_path / "r.json"
    assert run.main([*arguments, "--length", "40", "--batch", "3", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert "x official" in printed
    assert "shared" not in printed.splitlines()[0]
    assert record["batch"]["texts"] == len(TEXTS)
    assert record["batch"]["shared_prefix"] >= len("Instruct: find it\nQuery:")
    assert record["batch"]["longest"] <= 40
    points = {(p["engine"], p["num_steps"]): p for p in record["points"]}
    assert set(points) == {(GRAPH, 0), (GRAPH, 2), (OFFICIAL_EVAL, 2)}
    ours, official = points[GRAPH, 2], points[OFFICIAL_EVAL, 2]
    assert ours["speedup_over_official"] == pytest.approx(official["seconds"] / ours["seconds"], rel=1e-4)
    assert ours["time_over_zero"] == pytest.approx(ours["seconds"] / points[GRAPH, 0]["seconds"], rel=1e-4)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_equal_embeddings_agree(model):
    ours = np.eye(6, 32, dtype=np.float32)
    difference = corpus.compare(model, _job(), ours, 2 * ours, 2)  # the length does not count
    assert difference.measured["largest cosine distance"] < 1e-6


def test_one_wrong_text_of_many_is_found(model):
    """It is within the share that may be far away, so higher precision decides."""
    texts = [f"text number {i}" for i in range(40)]
    job = _job(texts=texts)
    official = corpus.encode_official(model, job, 2)
    assert corpus.compare(model, job, official.copy(), official, 2).verdict == OK
    wrong = official.copy()
    wrong[7] = official[8]
    found = corpus.compare(model, job, wrong, official, 2)
    assert found.verdict == WRONG
    assert "from higher precision" in found.describe(OFFICIAL_EVAL)
    # the other way round it is the official side that is off: that is what rounding may do
    difference = corpus.compare(model, job, official, wrong, 2)
    assert difference.verdict == OK
    assert difference.measured[f"of {OFFICIAL_EVAL}"] > difference.measured["their mean distance from higher precision"]


@pytest.mark.parametrize("change", ["all", "many", "nan", "shape"])
def test_wrong_embeddings_are_found(model, change):
    job = _job(texts=[f"text number {i}" for i in range(20)])
    official = corpus.encode_official(model, job, 2)
    wrong = official.copy()
    if change == "all":
        wrong = wrong[::-1]
    elif change == "many":
        wrong[:3] = -wrong[:3]
    elif change == "nan":
        wrong[2, 3] = np.nan
    else:
        wrong = wrong[:-1]
    assert corpus.compare(model, job, wrong, official, 2).verdict == WRONG


@pytest.fixture(scope="module")
def half(folder) -> GIRCSE:
    return corpus.load(str(folder), torch.bfloat16, "cpu")


def test_rounding_in_half_precision_is_no_mistake(half):
    job = _job(texts=[f"text number {i}" for i in range(20)])
    official, ours = (corpus._RUNS[engine](half, job, 20) for engine in (OFFICIAL_EVAL, GRAPH))
    found = corpus.compare(half, job, ours, official, 20)
    assert found.verdict == OK, found
    assert found.measured[f"of {OFFICIAL_EVAL}"] > 0
    assert corpus.compare_few(half, job, 20).verdict == OK


def test_one_step_too_few_is_found_in_half_precision(half, monkeypatch):
    """Within half precision's rounding; not within float32's."""
    encode = corpus.encode_ours
    monkeypatch.setitem(corpus._RUNS, GRAPH, lambda model, job, k: encode(model, job, k - 1))
    assert corpus.compare_few(half, _job(), 6).verdict == WRONG


def test_embeddings_of_other_texts_are_found_in_half_precision(half):
    job = _job(texts=[f"text number {i}" for i in range(20)])
    official = corpus.encode_official(half, job, 2)
    assert corpus.compare(half, job, official[::-1], official, 2).verdict == WRONG


def test_a_wrong_speed_is_marked(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: Ceilings(1e11, 1e10))
    encode = corpus.encode_ours
    monkeypatch.setitem(corpus._RUNS, GRAPH, lambda *arguments: encode(*arguments)[::-1])
    file, out = tmp_path / "texts.txt", tmp_path / "r.json"
    file.write_text("\n".join(TEXTS))
    arguments = ["--model", str(folder), "--corpus", str(file), "--steps", "2", "--length", "40", "--device", "cpu"]
    assert run.main([*arguments, "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["points"]
    assert {row["engine"]: row["verdict"] for row in rows} == {GRAPH: WRONG, OFFICIAL_EVAL: OK}
    assert "WRONG: graph disagrees with official-eval on 6 texts" in capsys.readouterr().err


def test_texts_of_a_file(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_text("one\n\n  two \u2028 with a separator\r\nthree\n", newline="", encoding="utf-8")
    assert corpus.texts_of(lines, "text", None) == ["one", "  two \u2028 with a separator", "three"]
    assert corpus.texts_of(lines, "text", 2) == ["one", "  two \u2028 with a separator"]
    objects = tmp_path / "a.jsonl"
    objects.write_text('{"title": "x"}\n{"title": 3}\n')
    with pytest.raises(corpus.CorpusError, match=r"a.jsonl:2: .*'title'"):
        corpus.texts_of(objects, "title", None)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(corpus.CorpusError, match="holds no text"):
        corpus.texts_of(tmp_path / "empty.txt", "text", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": 0.7}, "temperature is 0.7"), ({"include_prompt_state": True}, "include_prompt_state is true")],
)
def test_a_model_that_cannot_be_compared(folder, tmp_path, capsys, settings, message):
    copy = tmp_path / "other"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "gircse_config.json").write_text(GircseConfig(**settings).to_json())
    with pytest.raises(corpus.CorpusError, match=message):
        corpus.load(str(copy), torch.float32, "cpu")
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n")
    out = tmp_path / "r.json"
    assert run.main(["--model", str(copy), "--corpus", str(texts), "--length", "40", "--out", str(out)]) == 2
    assert f"bench/run.py: error: --model: its {message}" in capsys.readouterr().err
    assert not out.exists()


def test_a_shared_prefix_in_random_batches():
    batch = random_batch(131, [9, 6, 4], seed=0, device="cpu", shared_prefix=3)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(*batch, strict=True)]
    assert {tuple(row[:3]) for row in rows} == {tuple(rows[0][:3])}
    assert len({tuple(row[3:]) for row in rows}) == 3
    with pytest.raises(ValueError, match="shared_prefix: got 4"):
        random_batch(131, [9, 4], seed=0, device="cpu", shared_prefix=4)


def test_every_generation_engine_agrees_with_a_shared_prefix():
    lm = CausalLM.from_model(tiny_model("llama-tied"))
    engines = [OFFICIAL_EVAL, GRAPH, NO_REUSE]
    differences = check(lm, [REFERENCE, *engines], 3, 12, seed=0, shared_prefix=4)
    assert {d.engine for d in differences} == set(engines)
    assert {d.verdict for d in differences} == {OK}


def test_floor_with_a_shared_prefix():
    facts = ModelFacts.of(CausalLM.from_model(tiny_model("llama-tied")).model)
    apart, shared = facts.prompt([10, 12, 14]), facts.prompt([10, 12, 14], 8)
    assert shared.flops < apart.flops
    assert facts.prompt([10], 8).flops == facts.prompt([10]).flops
    # what is spared is two of three prefixes, and their attention
    assert apart.flops - shared.flops == 2 * facts.prompt([8]).flops


def test_docstrings_are_the_same_every_time(tmp_path, monkeypatch):
    part = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(part)})
    outs = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for out in outs:
        assert docstrings.main(["--limit", "40", "--out", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    texts = [json.loads(line)["text"] for line in outs[0].read_text().splitlines()]
    assert len(set(texts)) == 40
    assert all(len(text) >= docstrings.LEAST_CHARACTERS for text in texts)


def test_official_evaluation_is_stock_and_reads_nothing_ahead():
    assert ENGINES[OFFICIAL_EVAL].stock
    lm = CausalLM.from_model(tiny_model("gpt2"))  # absolute positions: left padding must not shift them
    assert {d.verdict for d in check(lm, [OFFICIAL_EVAL], 2, 9, seed=0)} == {OK}
