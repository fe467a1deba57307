"""Whatever bytes a file of rows or texts holds: the right rows, or an error that names file and line."""

from __future__ import annotations

import gzip
import json
import re
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse.data.errors import DataError
from gircse.data.labelled_texts import LabelledTexts
from gircse.data.rows import Row, load_rows, parse_row, read_jsonl
from gircse.data.sources import JsonlSource, open_sources
from gircse.encode.files import read_texts
from tests.fuzz.json_values import ODD_LINES, damaged, dumped, values
from tests.fuzz.outcome import outcome
from tests.fuzz.profiles import fuzz

FIELDS = ("prompt", "query", "pos", "neg", "text", "label")


@st.composite
def lines(draw) -> bytes:
    kind = draw(st.sampled_from(["good", "one field", "any", "odd"]))
    if kind == "odd":
        return draw(st.sampled_from(ODD_LINES))
    if kind == "any":
        return dumped(draw(values))
    record = {"prompt": "find", "query": "é", "pos": ["b"], "neg": ["c"], "text": "d", "label": draw(st.integers(0, 3))}
    if kind == "one field":
        record[draw(st.sampled_from(FIELDS))] = draw(values)
    return json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows of mine.jsonl"


contents = st.lists(lines(), max_size=6).map(b"\n".join) | st.binary(max_size=40)


def expected_rows(content: bytes) -> list[Row] | None:
    """What is in it by Python's own reader, line by line; None: something is wrong."""
    try:
        plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        parts = plain.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return [parse_row(json.loads(part.decode())) for part in parts if part.strip()]
    except Exception:  # of whatever kind
        return None


@fuzz(120)
@given(data=st.data())
def test_rows(path, data):
    content = damaged(data.draw(contents), data.draw)
    path.write_bytes(content)
    named = re.compile(rf"{re.escape(str(path))}(:\d+)?: ")
    readers = (read_jsonl, load_rows, lambda p: [s.row(i) for s in open_sources([p]) for i in range(len(s))])
    found = []
    for read in readers:
        rows, error = outcome(lambda read=read: read(path), DataError)
        if error is not None:
            assert error.total >= len(error.problems) > 0
            assert all(named.match(problem) for problem in error.problems)
        found.append(error.problems if error is not None else rows)
    assert found[0] == found[1] == found[2]
    if isinstance(found[0], list):  # the readers refuse more (a key twice, NaN), and never read anything else
        assert found[0] == expected_rows(content)


@fuzz(40)
@given(data=st.data())
def test_a_file_that_changes_after_it_was_checked(path, data):
    content = b"\n".join(dumped({"prompt": "p", "query": f"q{i}", "pos": [f"p{i}"]}) for i in range(4)) + b"\n"
    path.write_bytes(content)
    source = JsonlSource(path)
    rows = [source.row(i) for i in range(4)]
    path.write_bytes(damaged(content, data.draw))
    for i in range(4):
        row, error = outcome(lambda i=i: source.row(i), DataError)
        assert row == rows[i] or str(error) == f"{path}:{i + 1}: has changed since the data were checked"


@fuzz(80)
@given(data=st.data())
def test_texts_to_encode(path, data):
    content = damaged(data.draw(contents), data.draw)
    for name in (path, path.with_suffix(".txt")):
        name.write_bytes(content)
        found, error = outcome(lambda name=name: list(chain(*read_texts(str(name)))), ValueError)
        if error is not None:
            assert re.match(rf"{re.escape(str(name))}:\d+: ", str(error))
            continue
        lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig"))
        if name is path:
            records = [json.loads(line) for line in lines if line.strip()]
            assert found == [record["text"] if isinstance(record, dict) else record for record in records]
        else:
            assert found == (lines if lines[-1] else lines[:-1])


@fuzz(80)
@given(data=st.data())
def test_labelled_texts(path, data):
    path.write_bytes(damaged(data.draw(contents), data.draw))
    found, error = outcome(lambda: LabelledTexts.read(str(path)), DataError)
    if error is not None:
        assert all(str(path) in problem for problem in error.problems)
    else:
        assert len(found.texts) == len(found.labels)
        assert len(set(found.labels)) > 1


@fuzz(60)
@given(value=values)
def test_a_record_of_any_kind(value):
    row, error = outcome(lambda: parse_row(value), ValueError)
    assert error is not None or parse_row(row) == row
