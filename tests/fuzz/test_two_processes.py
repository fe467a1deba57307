"""Two processes on one output folder: one wins and the other is told so, or both end well; nothing is corrupted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from gircse import GIRCSE
from tests.training_process import ROWS, command, settings, start

IN_USE = "another process is at work in it; wait for it, or name another folder"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": row.instruction, "query": row.query, "pos": list(row.positives)} for row in ROWS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def both(argv: list[str], tmp_path: Path) -> list[tuple[int, str]]:
    """Exit code and last line on standard error of two processes started at the same time with the same command."""
    errors = [tmp_path / "first.txt", tmp_path / "second.txt"]
    processes = [command(argv, path) for path in errors]
    for process in processes:
        process.join(120)
    return [
        (p.exitcode, (path.read_text().splitlines() or [""])[-1]) for p, path in zip(processes, errors, strict=True)
    ]


def test_training(base, tmp_path):
    run = tmp_path / "run"
    first = start(settings(base, run), pause=0.3)
    deadline = time.monotonic() + 120
    while not (run / "train_log.jsonl").exists() or not (run / "train_log.jsonl").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    options = ["train", "--model", str(base), "--data", str(tmp_path / "rows.jsonl"), "--output", str(run), "--resume"]
    (tmp_path / "rows.jsonl").write_text("")  # not even looked at
    second = command(options, tmp_path / "second.txt")
    second.join(120)
    assert second.exitcode == 2
    assert (tmp_path / "second.txt").read_text() == f"gircse train: error: [Errno 11] {run}: {IN_USE}\n"
    assert first.is_alive()
    first.join(120)
    assert first.exitcode == 0
    log = [json.loads(line)["step"] for line in (run / "train_log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 13))
    assert not list(run.glob(".*"))
    GIRCSE.from_pretrained(run / "model")


def test_distilling(base, rows, tmp_path):
    run = tmp_path / "run"
    options = ["distill", "--teacher", str(base), "--data", str(rows), "--output", str(run), "--batch-size", "4"]
    ends = sorted(both([*options, "--max-steps", "4", "--no-progress"], tmp_path))
    assert [code for code, _ in ends] == [0, 2]
    assert IN_USE in ends[1][1] or "holds a run already" in ends[1][1]
    assert len((run / "distill_log.jsonl").read_text().splitlines()) == 4
    assert set(json.loads((run / "distill_result.json").read_text())) == {"agreement", "quality"}
    assert GIRCSE.from_pretrained(run / "model").num_steps == 0


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_encoding(base, tmp_path, name):
    texts = [f"text {i} {'o' * (i % 5)}" for i in range(40)]
    (tmp_path / "in.txt").write_text("".join(text + "\n" for text in texts))
    options = ["encode", "--model", str(base), "--output", str(tmp_path / name), "--rows-per-task", "8"]
    ends = sorted(both([*options, str(tmp_path / "in.txt")], tmp_path))
    # A file has one writer at a time; in a folder both write the same.
    assert [code for code, _ in ends] in ([[0, 0]] if name == "out" else [[0, 0], [0, 2]])
    assert ends[1][0] == 0 or IN_USE in ends[1][1]
    written = parquet.read_table(tmp_path / name)
    assert written["text"].to_pylist() == texts
    expected = GIRCSE.from_pretrained(base).encode(texts)
    np.testing.assert_allclose(np.array(written["embedding"].to_pylist()), expected, atol=1e-6)
    assert not list(tmp_path.rglob("*.partial*"))


def test_evaluating_rows(base, rows, tmp_path):
    options = ["evaluate", "--model", str(base), "--data", str(rows), "--steps", "1", "2"]
    assert [code for code, _ in both([*options, "--output", str(tmp_path / "scores.json")], tmp_path)] == [0, 0]
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"1", "2"}
