from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.data.errors import MAX_REPORTED
from gircse.data.rows import DataError, Row, format_passage, format_row, load_rows, parse_row, read_jsonl
from gircse.data.sources import JsonlSource, RecordSource

GOOD = {"prompt": "Given a question, retrieve passages", "query": "q", "pos": ["p"], "neg": ["n", "m"]}
ROW = Row("Given a question, retrieve passages", "q", ("p",), ("n", "m"))
LINE = json.dumps(GOOD).encode()


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_reads_plain_and_gzip_whatever_the_name(tmp_path):
    plain = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE + b"\r", b"", b"  \t", LINE, b"")
    assert read_jsonl(plain) == [ROW, ROW]
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_jsonl(str(packed)) == [ROW, ROW]
    misnamed = write(tmp_path / "plain.jsonl.gz", LINE)
    assert load_rows(misnamed) == [ROW]


def test_optional_fields_and_plain_strings():
    assert parse_row({"prompt": "i", "query": "q", "pos": "p"}) == Row("i", "q", ("p",), ())
    assert parse_row({"prompt": "i", "query": "q", "pos": ("p",), "neg": None, "id": 3}) == Row("i", "q", ("p",), ())
    assert parse_row({"prompt": "i", "query": "q", "pos": ["p"], "neg": "n"}).negatives == ("n",)
    assert parse_row({"query": "q", "pos": ["p"]}, instruction="given").instruction == "given"
    assert parse_row({"prompt": "own", "query": "q", "pos": ["p"]}, instruction="given").instruction == "own"
    assert parse_row({"query": "q", "pos": ["p"]}, instruction="").instruction == ""
    assert parse_row(ROW) == ROW


DOUBTS = {
    ("neg", "negs"): 'there is no "neg", and the field "negs" is ignored: was it meant?',
    ("neg", "hard_negatives"): 'there is no "neg", and the field "hard_negatives" is ignored: was it meant?',
    ("prompt", "instruction"): 'there is no "prompt", and the field "instruction" is ignored: was it meant?',
}


def warned(read, *args, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(*args, **options)
    return [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.parametrize(("field", "name"), DOUBTS)
def test_a_field_that_is_meant_for_another_is_named_once(tmp_path, field, name):
    row = {key if key != field else name: value for key, value in GOOD.items()}
    lines = [json.dumps(GOOD), *[json.dumps(row)] * 3]
    path = write(tmp_path / "a.jsonl", *map(str.encode, lines))
    for read in (read_jsonl, JsonlSource):
        found = warned(read, path, instruction="given")
        assert found == [f"{path}:2: {DOUBTS[field, name]} (and so in 2 more rows)"]
    for read in (load_rows, lambda rows, **options: RecordSource("rows", rows, **options)):
        assert warned(read, [row], instruction="given") == [f"rows:row 0: {DOUBTS[field, name]}"]


@pytest.mark.parametrize("text", ['["a", "b"]', "['a']", ' [ "a\\nb" ]\n'])
def test_a_list_inside_a_string_is_named_once(text):
    for value in (text, [text], ["p", text]):
        rows = [{**GOOD, "neg": value}] * 2
        assert parse_row(rows[0]).negatives[-1] == text
        assert warned(load_rows, rows) == [
            'rows:row 0: "neg" holds a list that is written inside a string: it is taken for one text'
            " (and so in 1 more rows)"
        ]


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {**GOOD, "neg": []},
        {**GOOD, "negs": ["x"], "instruction": "y"},
        {"prompt": "i", "query": "q", "pos": ["[1] a note"], "neg_scores": [0.5], "n_pos": 3},
        {"prompt": "i", "query": "[]", "pos": ["[a]", '["a" and "b"'], "neg": None},
    ],
)
def test_what_is_in_no_doubt_is_not_warned_of(row):
    assert warned(load_rows, [row]) == []


def test_joined_files(tmp_path):
    """A byte order mark in the middle: where a file's first line is a line, it is read; otherwise it is named."""
    bom = b"\xef\xbb\xbf"
    path = write(tmp_path / "a.jsonl", bom + LINE, bom + LINE, LINE)
    source = JsonlSource(path)
    assert read_jsonl(path) == [source.row(i) for i in range(3)] == [ROW] * 3
    with pytest.raises(DataError) as caught:
        read_jsonl(write(tmp_path / "b.jsonl", LINE + bom + LINE))
    assert caught.value.problems[0].endswith(
        "b.jsonl:1: invalid JSON: a byte order mark, as if two files had been joined without a line break between "
        f"them, at column {len(LINE) + 1}"
    )


BAD_LINES = {
    b'{"query": "a\tb"}': "invalid JSON: Invalid control character at column 13",
    b'{"query": "a': "invalid JSON: Unterminated string starting at column 11",
    b'{"prompt": "i", "query": "q", "positives": ["p"]}': 'the field "pos" is missing, and "positives" is ignored',
    b"{": "invalid JSON: Expecting property name enclosed in double quotes at column 2",
    b"{} {}": "invalid JSON: Extra data at column 4",
    b"[1]": "expected an object with the fields prompt, query, pos and neg, got a list",
    b'"text"': "got a string",
    b"null": "got null",
    b'{"query": "q", "pos": ["p"]}': 'the field "prompt" is missing',
    b'{"prompt": "i", "pos": ["p"]}': 'the field "query" is missing',
    b'{"prompt": "i", "query": "q"}': 'the field "pos" is missing',
    b'{"prompt": 3, "query": "q", "pos": ["p"]}': '"prompt" must be a string, got a number',
    b'{"prompt": "i", "query": ["q"], "pos": ["p"]}': '"query" must be a string, got a list',
    b'{"prompt": "i", "query": " ", "pos": ["p"]}': '"query" is empty',
    b'{"prompt": "", "query": "q", "pos": ["p"]}': '"prompt" is empty',
    b'{"prompt": "i", "query": "q", "pos": []}': '"pos" is empty: a row needs at least one positive',
    b'{"prompt": "i", "query": "q", "pos": null}': '"pos" must be a list of strings, got null',
    b'{"prompt": "i", "query": "q", "pos": ["p", true]}': '"pos"[1] must be a string, got a boolean',
    b'{"prompt": "i", "query": "q", "pos": ["p"], "neg": ["n", ""]}': '"neg"[1] is empty',
    b'{"prompt": "i", "query": "q", "pos": ["p"], "neg": {}}': '"neg" must be a list of strings, got an object',
    b'{"prompt": "i", "query": "q", "pos": ["p"], "score": NaN}': "NaN is not valid JSON",
    b'{"prompt": "i", "query": "q", "pos": ["p"], "score": -Infinity}': "-Infinity is not valid JSON",
    b'{"prompt": "i", "query": "q", "pos": ["p"], "pos": ["r"]}': 'the key "pos" occurs more than once',
    b'{"prompt": "i", "query": "\\ud800", "pos": ["p"]}': '"query" has a lone surrogate at character 0',
    b'{"prompt": "i", "query": "\xff", "pos": ["p"]}': "not UTF-8: byte 0xff at position 27",
    b"[" * 100_000: "invalid JSON: nested too deeply",
    b'{"prompt": ' + b"9" * 10_000 + b"}": "",  # Python >= 3.11 refuses such a number, 3.10 reads it
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60].decode("ascii", "replace"))
def test_bad_lines_are_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", LINE, b"", line, LINE)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert BAD_LINES[line] in message
    assert caught.value.total == 1
    assert "\n" not in message


def test_many_bad_lines_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", LINE, *[b"oops"] * 25)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == MAX_REPORTED + 1
    assert lines[-1] == "and 15 more"
    assert lines[0].startswith(f"{path}:2: ")
    assert lines[9].startswith(f"{path}:11: ")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.total == 25


def test_huge_lines_are_passed_over(tmp_path):
    path = write(tmp_path / "a.jsonl", LINE, b'{"prompt": "' + b"x" * 5000, b"oops", LINE + b" " * 1000)
    with pytest.raises(DataError) as caught:
        read_jsonl(path, max_line_bytes=1000)
    assert caught.value.problems[0] == f"{path}:2: the line is longer than 1,000 bytes"
    assert caught.value.problems[1].startswith(f"{path}:3: invalid JSON")
    assert caught.value.problems[2].startswith(f"{path}:4: the line is longer")
    assert caught.value.total == 3
    path = write(tmp_path / "b.jsonl", LINE, LINE)
    assert len(read_jsonl(path, max_line_bytes=len(LINE))) == 2  # exactly at the limit, with and without line end


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        read_jsonl(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_rows("a\0b")
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match="no rows"):
            read_jsonl(write(tmp_path / "empty.jsonl", content))
    with pytest.raises(DataError, match="no rows"):
        load_rows([])
    for source in (None, 3, b"bytes", object()):
        with pytest.raises(DataError, match="expected a path"):
            load_rows(source)


def test_broken_gzip(tmp_path):
    whole = gzip.compress(b"\n".join([LINE + str(i).encode() * 0 for i in range(2000)]), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    for broken in (whole[:-20], whole[: len(whole) // 2], whole[:5], whole[:-8] + b"\0" * 8):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: cannot be read on from here"):
            read_jsonl(path)
    for position in range(0, len(whole), 7):  # flipped bits: an error or (in the header's time stamp) the right rows
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with contextlib.suppress(DataError):
            assert read_jsonl(path) == [ROW] * 2000


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.just(LINE), st.sampled_from(sorted(BAD_LINES)[:5])), max_size=8))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, lines):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.jsonl", *lines)
    try:
        rows = read_jsonl(path)
    except DataError as caught:
        rows, message = [], str(caught)
    assert set(rows) == {ROW} if rows else message.startswith(str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(GOOD)), inner, max_size=4),
    max_leaves=8,
)


@given(json_values)
def test_any_record_gives_a_row_or_a_value_error(record):
    try:
        row = parse_row(record)
    except ValueError:
        pass
    else:
        assert row.positives
        assert all(isinstance(t, str) and t.strip() for t in (row.query, *row.positives, *row.negatives))


def test_datasets_objects_and_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([GOOD, GOOD])
    assert load_rows(data) == load_rows([GOOD, ROW]) == load_rows(iter([GOOD, GOOD])) == [ROW, ROW]
    data.save_to_disk(str(tmp_path / "one"))
    assert load_rows(str(tmp_path / "one")) == [ROW, ROW]
    both = datasets.DatasetDict(train=data, other=data.select([0]))
    both.save_to_disk(str(tmp_path / "two"))
    assert load_rows(tmp_path / "two") == [ROW, ROW]
    assert load_rows(both, split="other") == [ROW]
    with pytest.raises(DataError, match="has the splits train, other: there is no 'test'"):
        load_rows(both, split="test")
    with pytest.raises(DataError, match="has no splits"):
        load_rows(data, split="train")
    with pytest.raises(DataError, match="has the splits a, b: choose one with split="):
        load_rows({"a": data, "b": data})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data set written by save_to_disk"):
        load_rows(tmp_path / "empty")
    with pytest.raises(DataError, match=r"rows:row 1: the field .prompt. is missing"):
        load_rows([GOOD, {}])


def test_several_sources_are_joined_and_checked_together(tmp_path):
    good = write(tmp_path / "good.jsonl", LINE)
    bad = [write(tmp_path / f"bad{i}.jsonl", *[b"oops"] * 8) for i in range(2)]
    assert load_rows((good, str(good))) == [ROW, ROW]
    with pytest.raises(DataError) as caught:
        load_rows([good, *bad])
    assert caught.value.total == 16
    assert len(caught.value.problems) == MAX_REPORTED
    assert caught.value.problems[8].startswith(f"{bad[1]}:1: ")


def test_format_row():
    assert format_row(ROW) == ("Instruct: Given a question, retrieve passages\nQuery:q", "p", ["n", "m"])
    symmetric = Row("Retrieve semantically similar text", "q {text}", ("p", "{instruction}"), ("n",))
    prefix = "Instruct: Retrieve semantically similar text\nQuery:"
    query, positive, negatives = format_row(symmetric, positive=1)
    assert (query, positive, negatives) == (prefix + "q {text}", prefix + "{instruction}", [prefix + "n"])
    assert format_row(Row("", "q", ("p",))) == ("q", "p", [])
    assert format_passage(None, "p") == "p"
    assert format_row(ROW, template="{text} | {instruction}")[0] == "q | Given a question, retrieve passages"
