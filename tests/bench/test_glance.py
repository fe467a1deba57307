"""The first table of the performance page: each kind of record on the same columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import documents
from bench.blocks_glance import at_a_glance
from bench.documents import NO_RECORD, STALE, Results
from bench.engines import GRAPH, OFFICIAL_EVAL, REFERENCE

ORIGIN = {"device": "A processor", "driver": None, "sources": "present"}
MODEL = {"name": "a model", "dtype": "float32", "device": "cpu"}


@pytest.fixture
def table(tmp_path: Path, monkeypatch):
    """Records by name -> the rendered block, as lists of cells."""
    monkeypatch.setattr(documents, "sources_hash", lambda _: "present")

    def render(**records: dict) -> list[list[str]]:
        for name, record in records.items():
            (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": ORIGIN, **record}))
        text = at_a_glance(Results(tmp_path))
        return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]

    return render


def _run(benchmark: str, *rows: tuple[str, int, float, float]) -> dict:
    points = [{"engine": e, "num_steps": k, "seconds": s, "floor_seconds": f} for e, k, s, f in rows]
    batch = {"texts": 4, "length": 8}
    return {"benchmark": benchmark, "model": MODEL, "batch": batch, "points": points}


def test_runs_at_their_largest_k(table):
    encoding = [(GRAPH, 0, 9.0, 9.0), (REFERENCE, 5, 8.0, 1.0), (GRAPH, 5, 2.0, 1.0), (OFFICIAL_EVAL, 5, 4.0, 1.0)]
    rows = table(
        training=_run("training", ("cached", 5, 0.5, 0.25)),
        throughput=_run("throughput", *encoding),
        nothing_of_ours=_run("throughput", (REFERENCE, 5, 8.0, 1.0)),
        other={"benchmark": "tests"},
    )
    assert [row[:2] for row in rows] == [
        ["encoding 4 x 8 tokens, a model, float32, K = 5", "A processor"],
        ["a training step, 4 x 8 tokens, a model, float32, K = 5", "A processor"],
    ]
    assert rows[0][2:] == ["1,000", "2,000", "2.00", "8,000", "-", "4,000", "`throughput`"]
    assert rows[1][2:] == ["250", "500", "2.00", "-", "-", "-", "`training`"]


def test_what_is_wrong_is_marked_and_what_failed_costs_nothing(table):
    wrong = _run("throughput", (GRAPH, 5, 2.0, 1.0), (OFFICIAL_EVAL, 5, 4.0, 1.0))
    rows = table(
        a=wrong | {"agreement": {"verdict": "UNCHECKED", "why": "no memory"}},
        b=wrong | {"points": [wrong["points"][0] | {"verdict": "WRONG"}]},
        c=_run("training"),
    )
    assert [row[3] for row in rows] == ["2,000 UNCHECKED", "2,000 WRONG"]


def test_ops_and_their_floors(table):
    def point(rows: int, **more: float) -> dict:
        return {"rows": rows, "pass": "forward", "milliseconds": {"ours": 2.0, "eager": 6.0, **more}}

    old = {"benchmark": "soft_embed", "shape": "a shape", "points": [point(1), point(4), point(16)]}
    new = {**old, "points": [{**point(16, compiled=4.0), "floor_milliseconds": 1.6}]}
    loss = {"rows": 8, "candidates": 16, "num_steps": 5, "width": 4, "milliseconds": {"ours": 3.0, "separate": 1.0}}
    stale = {**ORIGIN, "sources": "older"}
    rows = table(a=old, b=new, c={"benchmark": "info_nce", "points": [loss], "provenance": stale})
    assert [row[0] for row in rows[:2]] == [f"`soft_embed`, a shape, T = {t}, forward" for t in (1, 16)]
    assert rows[0][2:8] == ["-", "2", "-", "6", "-", "-"]
    assert rows[2][2:8] == ["1.6", "2", "1.25", "6", "4", "-"]
    assert rows[3][2:] == ["-", "3", "-", "-", "-", "-", f"`c`{STALE}"]


def test_what_is_missing_is_said(tmp_path):
    assert f"On a GPU: {NO_RECORD}" in at_a_glance(Results(tmp_path))
    record = {"benchmark": "op", "device": "cuda", "case": "none of these", "provenance": {**ORIGIN, "driver": "570"}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert NO_RECORD not in at_a_glance(Results(tmp_path))
