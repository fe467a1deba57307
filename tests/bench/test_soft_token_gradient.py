"""The benchmark of sequential steps and steps by the block."""

from __future__ import annotations

import json

from bench import soft_token_gradient
from bench.shapes import SHAPES
from bench.soft_token_gradient import main, operators

SMALL = ["--layers", "1", "--rows", "1", "--length", "4", "--repeats", "1"]


def test_two_more_steps_by_the_block_take_less_than_half_the_operators():
    more = {factor: operators(3, factor) - operators(1, factor) for factor in (0.0, 1.0)}
    assert 0 < more[0.0] < 0.5 * more[1.0]


def test_a_record_and_no_time_where_the_two_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soft_token_gradient, "operators", lambda steps, factor: 7)
    monkeypatch.setattr(soft_token_gradient, "STEPS", (0, 2))
    monkeypatch.setitem(SHAPES["smollm2-135m"].settings, "vocab_size", 2048)  # it would take most of the time
    out = tmp_path / "record.json"
    assert main([*SMALL, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [point["num_steps"] for point in record["points"]] == [0, 2]
    assert all(seconds > 0 for point in record["points"] for seconds in point["seconds"].values())
    out.unlink()
    monkeypatch.setattr(soft_token_gradient, "disagreement", lambda *_: float("nan"))
    assert main([*SMALL, "--out", str(out)]) == 1
    assert not out.exists()
    assert "differ" in capsys.readouterr().out
