"""A disk that fills while a command writes: an error that says so, and no half of a file under its name.

Training is in tests/train/test_never_lost.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from pyarrow import parquet

from gircse import GIRCSE
from gircse.cli import main
from gircse.cli.evaluate import _write_json
from gircse.data.rows import Row
from gircse.encode.files import embedding_writer
from gircse.evaluation.results import Evaluation, TaskScores, write_results
from gircse.evaluation.step_store import StepStore
from gircse.train.distill import distill
from gircse.train.distill_config import DistillConfig
from tests.fuzz.full_disk import files_of_at_most, names

TOO_LARGE = "File too large"


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_parquet(base, tmp_path, capsys, name):
    texts = tmp_path / "in.txt"
    texts.write_text("".join(f"{i}\n" for i in range(20)))
    output = tmp_path / name
    options = ["encode", "--model", str(base), "--output", str(output), "--rows-per-task", "8", str(texts)]
    with files_of_at_most(2048):  # enough for the settings
        assert main(options) == 2
    assert TOO_LARGE in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.parquet"))
    assert main(options) == 0
    assert parquet.read_table(output)["text"].to_pylist() == [str(i) for i in range(20)]


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_a_file_of_embeddings(tmp_path, name):
    (tmp_path / name).write_bytes(b"of an earlier run")
    with (
        files_of_at_most(1024),
        pytest.raises(OSError, match=TOO_LARGE),
        embedding_writer(str(tmp_path / name)) as write,
    ):
        write(np.ones((400, 8), np.float32))
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"of an earlier run"


def test_results_of_an_evaluation(tmp_path):
    tasks = [TaskScores(f"task {i}", "STS", "cosine", {1: 0.5, 2: 0.25}) for i in range(40)]
    evaluation = Evaluation("a/b", "1", None, tasks, 0)
    with files_of_at_most(1024), pytest.raises(OSError, match=TOO_LARGE):
        write_results(evaluation, tmp_path)
    assert names(tmp_path) == []
    with files_of_at_most(64), pytest.raises(OSError, match=TOO_LARGE):
        _write_json({1: {"ndcg@10": 0.5, "mrr@10": 0.25, "recall@10": 0.125}}, str(tmp_path / "scores.json"))
    assert names(tmp_path) == []


def test_embeddings_of_steps(tmp_path):
    with StepStore([1, 2], tmp_path) as store:
        steps = np.ones((2, 64), np.float32)
        with files_of_at_most(1024), pytest.raises(OSError, match=TOO_LARGE):
            store.embeddings([str(i) for i in range(20)], 1, lambda texts: [steps] * len(texts))
        found = store.embeddings(["3", "4"], 2, lambda texts: [np.full((2, 64), float(t), np.float32) for t in texts])
        np.testing.assert_array_equal(found, np.array([[3.0], [4.0]]) * np.ones(64))
    assert names(tmp_path) == []


def test_distillation(base, tmp_path):
    rows = [Row("find", f"query {i}", (f"answer {i}",)) for i in range(8)]
    options = {"teacher": str(base), "batch_size": 4, "max_steps": 2, "progress": False}
    with files_of_at_most(4096), pytest.raises(OSError, match="could not be written|File too large"):
        distill(DistillConfig(output=str(tmp_path / "run"), **options), rows=rows)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not {"run/model", "run/distill_result.json"} & set(names(tmp_path))


def test_saving_a_model(base, tmp_path):
    model = GIRCSE.from_pretrained(base)
    model.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model.base.lm_head.weight.data.zero_()
    with files_of_at_most(8192), pytest.raises(OSError, match="could not be written|File too large"):
        model.save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert names(tmp_path) == sorted(["model", *(f"model/{name}" for name in before)])


def test_the_command_says_so_in_one_line(base, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a\nb\n")
    options = ["encode", "--model", str(base), "--output", str(tmp_path / "out.npy"), str(tmp_path / "in.txt")]
    with files_of_at_most(100):
        assert main(options) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("gircse encode: error: [Errno 27] File too large")
    assert names(tmp_path) == ["in.txt"]
    rows = [{"prompt": "find", "query": "a", "pos": ["b"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["evaluate", "--model", str(base), "--data", str(tmp_path / "rows.jsonl"), "--steps", "1"]
    with files_of_at_most(20):
        assert main([*options, "--output", str(tmp_path / "scores.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("gircse evaluate: error: [Errno 27]")
    assert names(tmp_path) == ["in.txt", "rows.jsonl"]
