"""Ray Data: one cluster of this machine for all tests, and few jobs and workers, because each worker takes seconds to
import torch and transformers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install gircse[ray]")

from gircse.cli import main  # noqa: E402
from gircse.corpora import encode_dataset  # noqa: E402
from gircse.corpora.ray_data import EncodingActor  # noqa: E402
from tests.corpora.slow_and_dying import runtime  # noqa: E402

TEXTS = [f"text {i} {'o' * (i % 5)}" for i in range(120)]
CPUS = 3  # a worker, what reads and writes, and what finds the rows that are done


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        context = ray.init(
            address="local",
            num_cpus=CPUS,
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env=runtime(folder),
        )
        yield context.address_info["address"]
        ray.shutdown()


def embeddings(table: pa.Table) -> np.ndarray:
    return np.array(table["embedding"].to_pylist(), dtype=np.float32)


def test_a_dataset_with_rows_that_fail_and_an_actor_that_dies(cluster, base, model):
    texts: list[str | None] = list(TEXTS)
    texts[25], texts[31], texts[47], texts[66] = None, "", "raise", "die"
    table = pa.table({"id": range(120), "text": texts})
    ds = ray.data.from_arrow([table.slice(0, 50), table.slice(50)])
    options = {"num_steps": 1, "window": 10, "rows_per_task": 20, "on_error": "null", "preserve_order": True}
    done = encode_dataset(ds, base, **options)
    result = pa.concat_tables(ray.get(done.to_arrow_refs()))
    assert result.column_names == ["id", "text", "embedding", "embedding_error"]
    assert result.select(["id", "text"]).to_pylist() == table.to_pylist()  # in order, with an actor that died
    assert result["embedding"].is_null().to_pylist() == [i in (25, 47) for i in range(120)]
    errors = result["embedding_error"].to_pylist()
    assert {i: e for i, e in enumerate(errors) if e is not None} == {47: "RuntimeError: refused by the test"}
    for first in range(0, 120, 10):
        if first not in (20, 40):  # whole windows: the bits that `encode` gives
            expected = model.encode(texts[first : first + 10], num_steps=1)
            np.testing.assert_array_equal(embeddings(result.slice(first, 10)), expected)
    np.testing.assert_allclose(embeddings(result.slice(31, 1)), model.encode([""], num_steps=1), atol=1e-6)


def test_arguments_that_would_wait_for_ever_are_refused(cluster, base, tmp_path):
    ds = ray.data.range(3)
    with pytest.raises(ValueError, match="workers: got 3 of 1 CPUs each, expected at most 2 CPUs in all"):
        encode_dataset(ds, base, workers=3)
    with pytest.raises(ValueError, match=r"workers: got 2 of 1.25 CPUs each"):
        encode_dataset(ds, base, workers=(2, 8), num_cpus=1.25)
    with pytest.raises(ValueError, match="num_gpus: got 0 with device 'cuda'"):
        encode_dataset(ds, base, num_gpus=0, load={"device": "cuda"})
    with pytest.raises(ValueError, match="workers: got 1, expected an integer >= 2"):
        encode_dataset(ds, base, workers=(2, 1))
    encode_dataset(ds, base, workers=2)
    ds.context.checkpoint_config = ray.data.checkpoint.CheckpointConfig("id", str(tmp_path))
    with pytest.raises(ValueError, match="expected at most 1 CPUs in all: .* one to find the rows that are done"):
        encode_dataset(ds, base, workers=2)


def test_a_row_without_an_id_is_refused():
    actor = object.__new__(EncodingActor)
    actor.encoder, actor.id_column = (lambda table: table), "id"
    whole = pa.table({"id": [1, 2], "text": ["a", "b"]})
    assert actor(whole) is whole
    with pytest.raises(ValueError, match="id: got null in column 'id', expected a value in every row"):
        actor(pa.table({"id": [1, None], "text": ["a", "b"]}))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Of a folder and an ending that Ray treats in a way of its own."""
    folder = tmp_path / "lang=en"
    folder.mkdir()
    for k, suffix in enumerate(("parquet", "parquet", "pq", "pq")):
        rows = range(30 * k, 30 * k + 30)
        pq.write_table(pa.table({"id": rows, "text": [TEXTS[i] for i in rows]}), folder / f"{k}.{suffix}")
    return folder


def command(base: str, corpus: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", base, "--output", str(out), "--num-steps", "1", "--rows-per-task", "10"]
    return ["encode", str(corpus), *options, "--ray", *more]


def test_the_driver_is_killed_and_started_again(cluster, base, corpus, tmp_path, model, capsys):
    out = tmp_path / "out"
    arguments = command(base, corpus, out, "--id", "id")
    driver = (
        f"import sys, ray; ray.init({cluster!r}, runtime_env={runtime(tmp_path, pause=0.5)!r}, logging_level='error');"
        "from gircse.cli import main; import gircse.corpora.ray_files;"
        "assert 'torch' not in sys.modules;"  # which a driver would spend seconds on
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list((out / ".gircse" / "checkpoint").glob("*[0-9].parquet"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 2 <= len(before) < 12
    assert main([*arguments, "--instruction", "find"]) == 2
    assert f"instruction: {out} was begun with None, got 'find'" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "120 rows are in" in capsys.readouterr().err
    assert ray.data.DataContext.get_current().use_datasource_v2  # as other jobs of the process expect
    result = pq.read_table(out).sort_by("id")
    assert result.column_names == ["id", "text", "embedding"]
    assert result["id"].to_pylist() == list(range(120))
    assert result["text"].to_pylist() == TEXTS
    np.testing.assert_allclose(embeddings(result), model.encode(TEXTS, num_steps=1), atol=1e-6)
    assert sum(path.exists() and path.stat().st_mtime_ns == time for path, time in before.items()) >= 2


def test_an_error_of_a_worker_is_one_line(cluster, base, tmp_path, capsys, monkeypatch):
    class Raising:
        def __call__(self, table: pa.Table) -> pa.Table:
            raise ValueError(f"refused: {', '.join(map(str, table.schema.types))}\nby the test") from KeyError("cause")

    def map_job(ds, job, **options):
        return ds.map_batches(Raising, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=1))

    monkeypatch.setattr("gircse.corpora.ray_files.map_job", map_job)  # a worker without a model starts at once
    (tmp_path / "in").mkdir()
    row = {"id": "2020-01-01", "text": "2020-01-02", "more": [1]}  # texts that Ray would take for times
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(row))
    assert main(command(base, tmp_path / "in", tmp_path / "out", "--id", "id")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "gircse encode: error: refused: string, string, list<item: int64>"
    assert not (tmp_path / "out" / ".gircse").exists()


def test_what_cannot_go_on_is_refused_before_a_cluster_is_met(base, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ray, "init", None)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.parquet").write_bytes(b"")
    (tmp_path / "in.txt").write_text("a\n")
    out = tmp_path / "out"
    for arguments, message in (
        (command(base, corpus, out), "id: got None, expected one of id, text: by it"),
        (command(base, corpus, out, "--id", "key"), "id: got 'key'"),
        (command(base, corpus, tmp_path / "foreign", "--id", "id"), "has files but no .gircse/job.json"),
        (command(base, corpus, tmp_path / "o.parquet", "--id", "id"), "expected a folder"),
        (command(base, corpus, out, "--id", "id", "--part", "1/2"), "part: got a share with --ray"),
        (command(base, corpus, out, "--id", "id", "--column", "id"), "id: got a column of int64, expected strings"),
        (["encode", str(tmp_path / "in.txt"), *command(base, corpus, out)[2:]], "input: got lines of text"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_rows_need_no_cluster(base, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", None)
    empty = pa.schema([("id", pa.int64()), ("text", pa.string())]).empty_table()
    pq.write_table(empty, tmp_path / "0.parquet")
    assert main(command(base, tmp_path, tmp_path / "out", "--id", "id")) == 0
    result = pq.read_table(tmp_path / "out")
    assert result.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert len(result) == 0
