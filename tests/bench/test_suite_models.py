"""The suite's encodings and training steps: what is shown and marked when something is wrong."""

from __future__ import annotations

import time

import pytest
import torch

from bench.engines import Generation
from bench.suite import attempts, models
from bench.suite.model_cases import SMOKE_MODEL_CASES
from tests.bench.suite_runner import MODELS


def test_a_wrong_model_is_shown_and_marked(suite, monkeypatch):
    """The engine forgets the last step of everything."""
    states = Generation.__call__

    def one_step_less(self, lm, ids, mask, num_steps):
        found = states(self, lm, ids, mask, num_steps)
        return torch.cat([found[:, :1], found[:, :-1]], dim=1) if num_steps else found

    monkeypatch.setattr(Generation, "__call__", one_step_less)
    assert suite("--only", "engine") == 1
    (problem,) = suite.record("summary")["problems"]
    assert problem.startswith(f"{MODELS[0]}: WRONG: graph disagrees with recompute on ")
    lines = suite.lines()
    assert [lines[f"{MODELS[0]}, K = {k}"]["ours"] > 0 for k in (0, 2)] == [True, True]
    assert lines[f"{MODELS[0]}, K = 2"]["met"] is False


def test_a_model_that_could_not_be_checked_is_marked(suite, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models.encode_check, "check", no_room)
    assert suite("--only", "engine") == 1
    assert suite.record("summary")["problems"] == [f"{MODELS[0]}: UNCHECKED: out of memory"]
    assert suite.record(MODELS[0])["points"][0]["seconds"] > 0


def test_a_step_that_was_not_captured_or_fused_is_named(suite, monkeypatch):
    monkeypatch.setattr(models.encode_check, "check", lambda *_, **__: [])
    kept = {"not_captured": "RuntimeError: a synchronisation", "not_fused": "an unknown norm"}
    monkeypatch.setattr(Generation, "report", lambda *_: kept)
    assert suite("--only", "engine") == 1
    assert suite.record("summary")["problems"] == [
        f"{MODELS[0]}: graph ran its step eagerly: RuntimeError: a synchronisation",
        f"{MODELS[0]}: graph ran the model's own decoder: an unknown norm",
    ]


def test_a_comparison_that_was_lost_is_left_out(suite, monkeypatch, tmp_path):
    """It hung, and the suite was started again: the figures stay, marked."""
    state = {"problems": [], "left_out": [f"checks-{SMOKE_MODEL_CASES[0].shape}"], "deadline": time.time() + 60}
    attempts.write(tmp_path / "state.json", state)
    monkeypatch.setenv(attempts.STATE, str(tmp_path / "state.json"))
    monkeypatch.setattr(models.encode_check, "check", lambda *_, **__: pytest.fail("compared"))
    monkeypatch.setattr(attempts, "die_with_parent", lambda: None)
    assert suite("--only", "engine,tests") == 1
    assert suite.measured == suite.compiled == []
    (problem,) = suite.record("summary")["problems"]
    assert problem == f"{MODELS[0]}: UNCHECKED: RuntimeError: the comparison was lost in an earlier attempt"
    assert suite.lines()[f"{MODELS[0]}, K = 2"]["ours"] > 0


def test_an_engine_that_fails_costs_the_baseline_nothing(suite, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(Generation, "__call__", broken)
    monkeypatch.setattr(Generation, "report", broken)
    assert suite("--only", "engine") == 1
    problems = suite.record("summary")["problems"]
    assert any("FAILED: graph from K = 0 on: RuntimeError: cannot be captured" in line for line in problems)
    line = suite.lines()[f"{MODELS[0]}, K = 2"]
    assert line["ours"] is None
    assert line["baseline"] > 0
    assert line["met"] is False


def test_a_profile_costs_no_figure_and_is_made_later(suite, monkeypatch):
    """Where it fails; and where it is asked for when everything has been measured."""
    monkeypatch.setattr(models.train_check, "check", lambda *_: [])
    assert suite("--only", "training") == 0

    def broken(what, *_, **__):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(models, "profile", broken)
    assert suite("--only", "training", "--profile") == 1
    assert suite.record("summary")["problems"] == [f"profile-{MODELS[1]}: RuntimeError: no CUPTI"]
    assert suite.record(MODELS[1])["agreement"]["verdict"] == "ok"
    monkeypatch.setattr(models, "profile", lambda what, *_, **__: what)
    assert suite("--only", "training", "--profile") == 0
    assert (suite.records / f"profile-{MODELS[1]}.txt").exists()
    monkeypatch.setattr(models, "_train", lambda *_, **__: pytest.fail("measured again"))
    assert suite("--only", "training", "--profile") == 0
