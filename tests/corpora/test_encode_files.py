"""Files to files in this process: every kind, shares, and starting again after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gircse.cli import main
from gircse.corpora.objects import visible
from gircse.corpora.part import Part
from gircse.corpora.sources import Source
from tests.forkserver import CONTEXT

TEXTS = [f"text {i} {'o' * (i % 5)}" for i in range(50)]
ROWS = [{"id": i, "text": text, "more": {"n": [i]}} for i, text in enumerate(TEXTS)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two files, with row groups that fit nothing else."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in (("a", ROWS[:23]), ("b", ROWS[23:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=7)
    return folder


@pytest.fixture
def encode(base):
    def run(*arguments: object) -> int:
        return main(["encode", "--model", base, "--num-steps", "1", *map(str, arguments)])

    return run


def embeddings(path: Path) -> np.ndarray:
    return np.array(pq.read_table(path)["embedding"].to_pylist(), dtype=np.float32)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("rows-*.parquet")}


def test_parquet_to_parquet_keeps_order_and_columns(encode, corpus, tmp_path, model):
    out = tmp_path / "out.parquet"
    assert encode(corpus, "--output", out, "--rows-per-task", 16) == 0
    result = pq.read_table(out)
    assert result.drop_columns("embedding").to_pylist() == ROWS
    parts = [model.encode(TEXTS[i : i + 16], num_steps=1) for i in range(0, 50, 16)]
    np.testing.assert_array_equal(embeddings(out), np.concatenate(parts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.parquet"]


def test_other_kinds_and_urls(encode, corpus, tmp_path, model):
    expected = model.encode(TEXTS, num_steps=1)
    lines = tmp_path / "in.jsonl"
    rows = [{**row, "late": 0.5} if i > 40 else row for i, row in enumerate(ROWS)]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert encode(lines, "--output", tmp_path / "jsonl.parquet") == 0
    found = pq.read_table(tmp_path / "jsonl.parquet").drop_columns("embedding").to_pylist()
    assert found == [{"late": None, **row} for row in rows]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/in/texts.txt", "\n".join(TEXTS).encode())
    assert encode("memory://in/texts.txt", "--output", "memory://out/x.parquet", "--column", "line") == 0
    with memory.open("/out/x.parquet") as file:
        result = pq.read_table(file)
    assert result["line"].to_pylist() == TEXTS
    np.testing.assert_allclose(np.array(result["embedding"].to_pylist()), expected, atol=1e-6)
    assert memory.ls("/out", detail=False) == ["/out/x.parquet"]
    assert encode(corpus / "*.parquet", "--output", tmp_path / "out.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_shares_make_up_the_whole(encode, corpus, tmp_path, model):
    for index in (2, 1, 3):
        assert encode(corpus, "--output", tmp_path / "out", "--rows-per-task", 8, "--part", f"{index}/3") == 0
        one = tmp_path / f"{index}.npy"
        assert encode(corpus, "--output", one, "--rows-per-task", 8, "--part", f"{index}/3") == 0
    before = files(tmp_path / "out")
    assert sorted(before) == [f"rows-{first:012d}.parquet" for first in range(0, 50, 8)]
    assert encode(corpus, "--output", tmp_path / "out", "--rows-per-task", 8) == 0
    assert files(tmp_path / "out") == before  # nothing was missing
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == list(range(50))
    loaded = np.concatenate([np.load(tmp_path / f"{index}.npy") for index in (1, 2, 3)])
    np.testing.assert_allclose(loaded, embeddings(tmp_path / "out"), atol=1e-6)
    np.testing.assert_allclose(loaded, model.encode(TEXTS, num_steps=1), atol=1e-6)


@pytest.mark.parametrize(("rows", "size", "count"), [(0, 4, 3), (9, 4, 2), (9, 4, 5), (100, 7, 4)])
def test_shares_are_disjoint_and_complete(rows, size, count):
    parts = [Part(i, count) for i in range(1, count + 1)]
    assert [row for part in parts for row in part.of_rows(rows, size)] == list(range(rows))
    blocks = [block for part in parts for block in part.of_blocks(rows, size)]
    assert blocks == list(range(max(1, -(-rows // size))))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_share_is_named(text):
    with pytest.raises(ValueError, match="part: got "):
        Part.of(text)


def test_no_rows_give_a_valid_file(encode, corpus, tmp_path):
    pq.write_table(pq.read_table(corpus / "a.parquet").slice(0, 0), tmp_path / "none.parquet")
    assert encode(tmp_path / "none.parquet", "--output", tmp_path / "out") == 0
    assert encode(tmp_path / "none.parquet", "--output", tmp_path / "out.parquet", "--part", "2/2") == 0
    assert encode(corpus, "--output", tmp_path / "last.parquet", "--part", "1/2") == 0  # one block, of the second share
    for name in ("out", "out.parquet", "last.parquet"):
        result = pq.read_table(tmp_path / name)
        assert len(result) == 0
        assert result.schema.field("embedding").type == pa.list_(pa.float32(), 32)


def die_in_the_third_block(argv: list[str]) -> None:
    from gircse.corpora.text_encoder import TextEncoder

    call = TextEncoder.__call__

    def dying(self, table, first_row):
        if first_row == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, table, first_row)

    TextEncoder.__call__ = dying
    main(argv)


def test_killed_and_started_again(base, encode, corpus, tmp_path, model):
    out, blocks = tmp_path / "out.parquet", tmp_path / ".out.parquet.gircse"
    command = ["encode", str(corpus), "--model", base, "--num-steps", "1", "--output", str(out), "--rows-per-task", "4"]
    process = CONTEXT.Process(target=die_in_the_third_block, args=(command,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(files(blocks)) == 2
    assert not out.exists()
    before = files(blocks)
    (blocks / ".rows-000000000000.parquet.x.partial.parquet").write_bytes(b"half")
    assert encode(corpus, "--output", out, "--rows-per-task", 5) == 2  # other settings
    assert files(blocks) == before
    seen: list[int] = []
    from gircse.corpora.text_encoder import TextEncoder

    call = TextEncoder.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "__call__", lambda self, table, row: (seen.append(row), call(self, table, row))[1])
        assert encode(corpus, "--output", out, "--rows-per-task", 4) == 0
    assert seen == list(range(4 * len(before), 50, 4))
    assert pq.read_table(out)["id"].to_pylist() == list(range(50))
    np.testing.assert_allclose(embeddings(out), model.encode(TEXTS, num_steps=1), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.parquet"]


def test_settings_are_compared_and_a_failed_start_leaves_nothing(encode, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(corpus, "--output", out, "--max-length", 0) == 2
    assert "max_length: got 0" in capsys.readouterr().err
    assert encode(corpus, "--output", out) == 0
    for option in (("--instruction", "find"), ("--rows-per-task", 8), ("--output-dtype", "float16")):
        assert encode(corpus, "--output", out, *option) == 2
        assert f"{option[0][2:].replace('-', '_')}: {out} was begun with" in capsys.readouterr().err
    assert encode(corpus, "--output", out, "--batch-size", 3) == 0
    with (corpus / "a.parquet").open("r+b") as file:
        file.write(b"PAR1\0")
    assert encode(corpus, "--output", out) == 2
    assert "input: " in capsys.readouterr().err
    (out / ".gircse" / "job.json").write_text("[3")
    assert encode(corpus, "--output", out) == 2
    assert "job.json cannot be read" in capsys.readouterr().err


def test_bad_input_is_one_line_and_loads_nothing(encode, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gircse.model.GIRCSE.from_pretrained", None)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.parquet").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "c"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    pq.write_table(pa.table({"text": ["a"], "other": [1]}), corpus / "c.parquet")
    out = tmp_path / "out.parquet"
    for arguments, message in (
        ((corpus / "a.parquet", "--output", tmp_path / "foreign"), "has files but no .gircse/job.json"),
        ((corpus / "a.parquet", "--output", out, "--column", "title"), "column: got 'title', expected one of id, text"),
        ((corpus / "a.parquet", "--output", out, "--output-column", "id"), "has a column 'id' already"),
        ((corpus / "a.parquet", "--output", out, "--column", "id"), "id: got a column of int64, expected strings"),
        ((corpus, "--output", out), "c.parquet has other columns than"),
        ((corpus / "a.parquet", tmp_path / "bad.jsonl", "--output", out), "files of the kinds jsonl and parquet"),
        ((tmp_path / "bad.jsonl", "--output", out), "bad.jsonl:1"),
        ((tmp_path / "half.jsonl", "--output", out), "half.jsonl:2: "),
        (("-", "--output", out), "input: got - (standard input)"),
        ((tmp_path / "no*.parquet", "--output", out), "No such file"),
        ((corpus / "a.parquet", "--output", "memory://x.npy"), "expected a file on a disk"),
        ((corpus / "a.parquet", "--output", "x.csv"), "output: got 'x.csv'"),
    ):
        assert encode(*arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_parquet_with_a_null_is_no_array(encode, tmp_path, capsys):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "in.parquet")
    assert encode(tmp_path / "in.parquet", "--output", tmp_path / "out.npy") == 2
    assert "in.parquet: row 1 has no text in 'text' (null)" in capsys.readouterr().err


def test_any_rows_of_any_files(corpus):
    source = Source.of([str(corpus)], "text")
    assert source.rows == [23, 27]
    for rows in (range(0, 50), range(3, 9), range(20, 31), range(49, 50)):
        tables = list(source.tables(rows, 6))
        assert [len(table) for table in tables[:-1]] == [6] * (len(tables) - 1)
        assert [i for table in tables for i in table["id"].to_pylist()] == list(rows)
    os.remove(corpus / "b.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), corpus / "b.parquet")
    with pytest.raises(ValueError, match="have become shorter, expected 50 rows"):
        list(source.tables(range(50), 6))


def test_an_input_that_changes_at_its_end_is_another(tmp_path):
    found = []
    for last in "ab":
        texts = [str(i) * 10_000 for i in range(10, 30)] + [last]
        pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", compression="none", use_dictionary=False)
        found.append(Source.of([str(tmp_path)], "text").identity()[0])
    assert found[0][:2] == found[1][:2]  # the name and the size
    assert found[0] != found[1]


def test_the_marker_of_a_folder_is_no_file_in_it(monkeypatch):
    class Store(fsspec.implementations.memory.MemoryFileSystem):
        def ls(self, path, detail=True, **options):
            return [f"{path}/"]

    monkeypatch.setattr("gircse.corpora.objects.place", lambda url: (Store(), "/bucket/out"))
    Store().mkdirs("/bucket/out", exist_ok=True)
    assert visible("s3://bucket/out") == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_output_that_is_an_input_is_refused(name, tmp_path, capsys):
    file = tmp_path / name
    file.write_text('{"text": "a red fox"}\n')
    assert main(["encode", str(file), "--model", "none", "--output", str(file)]) != 0
    assert "which is an input" in capsys.readouterr().err
    assert file.read_text() == '{"text": "a red fox"}\n'
