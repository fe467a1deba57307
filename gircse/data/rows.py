"""A user's own data: rows (instruction, query, positives, negatives), and how they are written for the model.

The schema is that of `cfli/bge-full-data` (docs/method.md §7): {"prompt": str, "query": str, "pos": [str, ...],
"neg": [str, ...]}. Everything is checked before anything starts: a training run never dies at row 180,000 because of
a typing error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gircse.data.errors import DataError, Problems
from gircse.data.jsonl import MAX_LINE_BYTES, check_unicode, open_jsonl, parse_line, read_lines
from gircse.lm.prompts import DEFAULT_TEMPLATE, format_query, is_symmetric


@dataclass(frozen=True)
class Row:
    """One training example: `positives` (at least one) answer `query`, `negatives` (maybe none) look as if they did."""

    instruction: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


# ---------------------------------------------------------------- one row


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a string, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{field} is empty")
    return check_unicode(value, field)


def _texts(value: object, field: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, field),)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{field} must be a list of strings, got {_kind(value)}")
    return tuple(_text(v, f"{field}[{i}]") for i, v in enumerate(value))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


_STEMS = {"prompt": ("prompt", "instruct"), "query": ("quer", "question"), "pos": ("pos",), "neg": ("neg",)}
_LIST_IN_A_STRING = re.compile(r"""\s*\[\s*(["']).*\1\s*\]\s*""", re.DOTALL)


def _meant_for(record: Mapping[Any, Any], field: str) -> str | None:
    """A field whose name is like that of a missing one, and which holds texts."""
    for name, value in record.items():
        alike = isinstance(name, str) and name not in _STEMS and any(stem in name.lower() for stem in _STEMS[field])
        texts = value if isinstance(value, (list, tuple)) else [value]
        if alike and texts and all(isinstance(text, str) for text in texts):
            return name
    return None


def _missing(record: Mapping[Any, Any], field: str) -> ValueError:
    other = _meant_for(record, field)
    hint = f", and {json.dumps(other[:60])} is ignored: was it meant?" if other is not None else ""
    return ValueError(f'the field "{field}" is missing{hint}')


def _doubts(record: object) -> Iterator[str]:
    """What a record that can be used probably means otherwise."""
    if not isinstance(record, Mapping):
        return
    for field in ("prompt", "neg"):  # the others are never missing
        other = None if record.get(field) else _meant_for(record, field)
        if other is not None:
            yield f'there is no "{field}", and the field {json.dumps(other[:60])} is ignored: was it meant?'
    for field in ("pos", "neg"):
        value = record.get(field) or ()
        texts = (value,) if isinstance(value, str) else value
        if any("[" in text[:8] and _LIST_IN_A_STRING.fullmatch(text) for text in texts):
            yield f'"{field}" holds a list that is written inside a string: it is taken for one text'


def checked_row(record: object, place: str, problems: Problems, *, instruction: str | None = None) -> Row | None:
    """`parse_row`; what is wrong, and what may be meant otherwise, goes to `problems`. None: it is wrong."""
    try:
        row = parse_row(record, instruction=instruction)
    except ValueError as error:
        problems.add(place, error)
        return None
    for doubt in _doubts(record):
        problems.doubt(place, doubt)
    return row


def checked_line(line: bytes, place: str, problems: Problems, *, instruction: str | None = None) -> Row | None:
    """`checked_row` of a line of JSON."""
    try:
        record = parse_line(line)
    except ValueError as error:
        problems.add(place, error)
        return None
    return checked_row(record, place, problems, instruction=instruction)


def parse_row(record: object, *, instruction: str | None = None) -> Row:
    """Checks one record of the schema and returns it as a `Row`; fields other than the four are ignored.

    "neg" may be missing, null or empty; "pos" and "neg" may be one plain string. `instruction` stands in where
    "prompt" is missing or empty (an empty one says: these texts need none). Raises ValueError with the reason.
    """
    if isinstance(record, Row):
        record = {
            "prompt": record.instruction,
            "query": record.query,
            "pos": record.positives,
            "neg": record.negatives,
        }
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object with the fields prompt, query, pos and neg, got {_kind(record)}")
    prompt = record.get("prompt")
    if instruction is not None and (prompt is None or (isinstance(prompt, str) and not prompt.strip())):
        prompt = instruction
    else:
        if "prompt" not in record:
            raise _missing(record, "prompt")
        prompt = _text(prompt, '"prompt"')
    for field in ("query", "pos"):
        if field not in record:
            raise _missing(record, field)
    query = _text(record["query"], '"query"')
    positives = _texts(record["pos"], '"pos"')
    if not positives:
        raise ValueError('"pos" is empty: a row needs at least one positive')
    negatives = record.get("neg")
    return Row(prompt, query, positives, () if negatives is None or negatives == "" else _texts(negatives, '"neg"'))


# ---------------------------------------------------------------- files


def read_jsonl(
    path: str | os.PathLike[str], *, instruction: str | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> list[Row]:
    """Reads and checks a JSONL file (plain or gzip, UTF-8 with or without BOM); blank lines are allowed.

    instruction: see `parse_row`. Every line is looked at before anything is returned; otherwise DataError lists up to
    10 bad lines as `file:line: reason`. A file without a row, an unreadable and a broken gzip file are errors as
    well.
    """
    path = Path(path)
    rows: list[Row] = []
    problems = Problems()
    with open_jsonl(path) as (file, _):
        for line in read_lines(file, path, problems, max_line_bytes=max_line_bytes):
            row = checked_line(line.content, f"{path}:{line.number}", problems, instruction=instruction)
            if row is not None:
                rows.append(row)
    problems.check()
    if not rows:
        raise DataError([f"{path}: no rows in it"])
    return rows


def open_saved(path: Path, split: str | None = None) -> tuple[Any, str]:
    """(data set, name for messages) of a folder written by `datasets` (save_to_disk); the rows stay on disk.

    Raises:
        DataError: no such data set, or no such split; None means "train" or the only one there is.
    """
    try:
        import datasets
    except ImportError:
        raise DataError([f"{path}: a folder is read with `datasets`, which is missing: pip install datasets"]) from None
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken or foreign folder makes pyarrow and json raise
        raise DataError([f"{path}: no data set written by save_to_disk: {error}"]) from error
    return _choose_split(saved, str(path), split)


def _choose_split(source: Any, label: str, split: str | None) -> tuple[Any, str]:
    if not isinstance(source, Mapping):  # a datasets.DatasetDict is one
        if split is not None:
            raise DataError([f"{label}: has no splits, but split={split!r} was asked for"])
        return source, label
    names = [str(name) for name in source]
    name = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if name is None or name not in names:
        asked = "choose one with split=" if name is None else f"there is no {name!r}"
        raise DataError([f"{label}: has the splits {', '.join(names) or '(none)'}: {asked}"])
    return source[name], f"{label}[{name}]"


def _load_all(paths: Sequence[str | os.PathLike[str]], instruction: str | None, split: str | None) -> list[Row]:
    """The rows of several files or folders, one after the other; the problems of all of them in one error."""
    rows: list[Row] = []
    problems = Problems()
    for path in paths:
        try:
            saved = Path(path).is_dir()
            rows += load_rows(path, instruction=instruction, split=split if saved else None)
        except DataError as error:  # noqa: PERF203
            problems.merge(error)
    problems.check()
    return rows


def load_rows(source: Any, *, instruction: str | None = None, split: str | None = None) -> list[Row]:
    """Rows from a JSONL file, a folder written by `datasets` (save_to_disk), a data set, or any iterable of records
    or Rows.

    instruction: see `parse_row`. split: which part of a source with several (default: "train", or the only one there
    is). Everything is checked first; DataError lists up to 10 bad rows as `file:line: reason` or `source:row number:
    reason` (rows count from 0, as in `dataset[number]`).
    """
    if isinstance(source, (list, tuple)) and source and all(isinstance(part, (str, os.PathLike)) for part in source):
        return _load_all(source, instruction, split)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if "\0" in str(path) or not path.is_dir():
            return read_jsonl(path, instruction=instruction)
        source, label = open_saved(path, split)
    else:
        source, label = _choose_split(source, "rows", split)
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise DataError([f"{label}: expected a path, a data set or a list of objects, got {_kind(source)}"])
    rows: list[Row] = []
    problems = Problems()
    for number, record in enumerate(source):
        row = checked_row(record, f"{label}:row {number}", problems, instruction=instruction)
        if row is not None:
            rows.append(row)
    problems.check()
    if not rows:
        raise DataError([f"{label}: no rows in it"])
    return rows


# ---------------------------------------------------------------- how rows are written


def format_passage(instruction: str | None, text: str, template: str = DEFAULT_TEMPLATE) -> str:
    """A positive or negative as the model reads it: with the instruction in symmetric tasks, bare in retrieval."""
    return format_query(instruction, text, template) if is_symmetric(instruction) else text


def format_row(row: Row, *, positive: int = 0, template: str = DEFAULT_TEMPLATE) -> tuple[str, str, list[str]]:
    """(query, positive number `positive`, all negatives) of a row, written for the model."""
    negatives = [format_passage(row.instruction, text, template) for text in row.negatives]
    chosen = format_passage(row.instruction, row.positives[positive], template)
    return format_query(row.instruction, row.query, template), chosen, negatives
