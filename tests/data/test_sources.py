"""Rows by offset: the same as read at once, in little memory, and never other than those that were checked."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.data.errors import DataError
from gircse.data.rows import Row, read_jsonl
from gircse.data.sources import JoinedSource, JsonlSource, RecordSource, open_source, open_sources


def record(i: int, **fields) -> dict:
    return {"prompt": "retrieve it", "query": f"q{i}", "pos": [f"p{i}", f"r{i}"], "neg": [f"é{i}"] * (i % 3), **fields}


def lines_of(count: int) -> list[bytes]:
    return [json.dumps(record(i), ensure_ascii=False).encode() for i in range(count)]


def all_rows(source) -> list[Row]:
    return [source.row(i) for i in range(len(source))]


def test_rows_by_offset_are_the_rows_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n \t\r\n".join(lines_of(5)) + b"\r\n\n" + b"\n".join(lines_of(3)))
    source = JsonlSource(path)
    assert all_rows(source) == read_jsonl(path)
    assert [source.place(i) for i in (0, 1, 4, 5, 7)] == [f"{path}:{line}" for line in (1, 3, 9, 11, 13)]
    assert source.row(6) == source.row(1)
    path.write_bytes(b"\n".join(lines_of(4)))
    assert [JsonlSource(path).place(i) for i in range(4)] == [f"{path}:{line}" for line in (1, 2, 3, 4)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([b"", b" ", b"\r", *lines_of(4)]), max_size=12), st.booleans(), st.booleans())
def test_any_mixture_of_lines(tmp_path_factory, lines, mark, packed):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = b"\xef\xbb\xbf" * mark + b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        expected = read_jsonl(path)
    except DataError:
        with pytest.raises(DataError, match="no rows in it"):
            JsonlSource(path)
        return
    source = JsonlSource(path)
    assert all_rows(source) == expected
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    assert [source.place(i) for i in range(len(source))] == [f"{path}:{number}" for number in numbers]


def test_packed_files_and_pipes_are_unpacked_on_disk(tmp_path):
    plain, packed, pipe = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "pipe"
    plain.write_bytes(b"\n\n".join(lines_of(50)))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(plain.read_bytes()), daemon=True).start()
    sources = [JsonlSource(path) for path in (plain, packed, pipe)]
    for source in sources:
        assert all_rows(source) == read_jsonl(plain)
        assert source.place(7).endswith(":15")
        assert source.fingerprint == sources[0].fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "pipe"]


def test_no_space_to_unpack(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines_of(50))))
    full = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: full)
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be unpacked into .*TMPDIR.*No space left"):
        JsonlSource(path)


def test_everything_is_checked_when_it_is_opened(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"\n".join([*lines_of(2), b"", b'{"prompt": "i"}', b"oops"]))
    with pytest.raises(DataError) as caught:
        open_sources([bad, tmp_path / "missing.jsonl"])
    assert caught.value.problems == (
        f'{bad}:4: the field "query" is missing',
        f"{bad}:5: invalid JSON: Expecting value at column 1",
        f"{tmp_path}/missing.jsonl: no such file",
    )
    with pytest.raises(DataError, match="the line is longer than 40 bytes"):
        JsonlSource(bad, max_line_bytes=40)
    bad.write_bytes(b" \n")
    with pytest.raises(DataError, match="no rows in it"):
        JsonlSource(bad)


def test_instructions_stand_in_by_source(tmp_path):
    names = ["a", "b"]
    for name in names:
        (tmp_path / name).write_text('{"query": "q", "pos": "p"}\n{"prompt": "own", "query": "q", "pos": "p"}\n')
    sources = open_sources([tmp_path / name for name in names], ["stands in", ""])
    assert [[row.instruction for row in all_rows(source)] for source in sources] == [["stands in", "own"], ["", "own"]]
    with pytest.raises(DataError, match='b:1: the field "prompt" is missing'):
        open_source(tmp_path / "b")


def test_a_changed_file_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines_of(10)) + b"\n")
    source = JsonlSource(path)
    before = source.row(3)
    times = path.stat()
    with path.open("r+b") as file:  # the same length, and the times put back
        content = file.read()
        file.seek(content.index(b"q3"))
        file.write(b"Q3")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=rf"{path}:4: has changed since the data were checked"):
        source.row(3)
    assert source.row(4).query == "q4"
    assert JsonlSource(path).fingerprint != source.fingerprint
    with path.open("ab") as file:
        file.write(lines_of(1)[0])
    assert source.row(9).query == "q9"  # what was checked is still there
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match=r":10: has changed"):
        source.row(9)
    assert before.query == "q3"


def test_a_replaced_or_deleted_file_changes_nothing(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"\n".join(lines_of(10)))
    other.write_bytes(b"\n".join(lines_of(10)[::-1]))
    source = JsonlSource(path)
    expected = all_rows(source)
    os.replace(other, path)
    assert all_rows(source) == expected
    path.unlink()
    assert all_rows(source) == expected


def test_data_sets_and_lists(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [record(i) for i in range(6)]
    expected = [Row("retrieve it", r["query"], tuple(r["pos"]), tuple(r["neg"])) for r in records]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    saved, listed = open_source(tmp_path / "saved"), RecordSource("rows", expected, instruction="")
    assert all_rows(saved) == all_rows(listed) == expected
    assert saved.fingerprint == listed.fingerprint != RecordSource("rows", expected[:5]).fingerprint
    assert saved.place(2) == f"{tmp_path}/saved:row 2"
    with pytest.raises(DataError, match='rows:row 1: "query" is empty'):
        RecordSource("rows", [records[0], record(1, query="")])
    with pytest.raises(DataError, match="rows: no rows in it"):
        RecordSource("rows", [])


def test_joined_sources():
    parts = [RecordSource(name, [record(i + 10 * n) for i in range(n + 1)]) for n, name in enumerate("abc")]
    joined = JoinedSource(parts)
    assert [joined.row(i).query for i in range(len(joined))] == ["q0", "q10", "q11", "q20", "q21", "q22"]
    assert [joined.place(i) for i in range(6)] == ["a:row 0", "b:row 0", "b:row 1", "c:row 0", "c:row 1", "c:row 2"]
    assert joined.name == "a, b, c"


MEASURE = """
import resource, sys
from gircse.train.batches import TrainingData
from gircse.train_config import TrainConfig

TrainConfig()  # imports torch
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
for path in sys.argv[1:]:
    data = TrainingData.open(TrainConfig(model="m", data=(path,), batch_size=16))
    queries = {example.query for step in range(200) for example in data.batch(step)}
    print(data.num_rows, len(queries), peak() - before)
"""


def test_files_larger_than_the_memory_they_take(tmp_path):
    packed, plain = tmp_path / "packed.jsonl", tmp_path / "plain.jsonl"
    text = "long text " * 300
    with gzip.open(packed, "wb", compresslevel=1) as one, plain.open("wb") as other:
        for i in range(20_000):
            line = json.dumps({"prompt": "retrieve", "query": f"q{i}", "pos": [f"{i} {text}"]}).encode() + b"\n"
            other.write(line)
            if i < 8_000:
                one.write(line)
    assert plain.stat().st_size > 60e6
    command = [sys.executable, "-c", MEASURE, packed, plain]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert [rows for rows, _, _ in measured] == [8_000, 20_000]
    assert all(queries == 200 * 16 for _, queries, _ in measured)
    assert max(mebibytes for _, _, mebibytes in measured) < 20
