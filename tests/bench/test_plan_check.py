"""The check of predicted memory, on the CPU: it passes here, and it can fail."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import plan_check
from gircse.traced_model import TracedModel


def test_predictions_hold(tmp_path, capsys):
    assert plan_check.main(["--smoke", "--out", str(tmp_path / "plan.json")]) == 0
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["met"] is True
    assert [point["checkpointing"] for point in record["points"]] == [False, True]
    assert all(abs(point["error"]) <= 0.15 for point in record["points"])
    assert "predictions within 15%: yes" in capsys.readouterr().out


def test_a_prediction_that_is_off_fails(monkeypatch, capsys):
    memory = TracedModel.memory

    def too_little(self, *args, **kwargs):
        found = memory(self, *args, **kwargs)
        return replace(found, moments=tuple(moment * 8 // 10 for moment in found.moments))

    monkeypatch.setattr(TracedModel, "memory", too_little)
    monkeypatch.setattr(plan_check, "SMOKE_CASES", plan_check.SMOKE_CASES[:1])
    assert plan_check.main(["--smoke"]) == 1
    assert "predictions within 15%: NO" in capsys.readouterr().out


def test_options(capsys):
    with pytest.raises(SystemExit) as stop:
        plan_check.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert "expected cuda, or cpu with --smoke" in capsys.readouterr().err
