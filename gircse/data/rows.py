"""A row of training data: its schema, its checks, and how it is written for the model.

The schema is that of `cfli/bge-full-data` (docs/method.md §7): {"prompt": str, "query": str, "pos": [str, ...],
"neg": [str, ...]}. Every row is checked before a run starts, so that a mistake in row 180,000 does not end it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gircse.data.errors import Problems
from gircse.data.jsonl import check_unicode
from gircse.lm.prompts import DEFAULT_TEMPLATE, format_query, is_symmetric


@dataclass(frozen=True)
class Row:
    """One training example. `positives` (one or more) answer `query`; `negatives` (any number) look as if they did."""

    instruction: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field}: got {_kind(value)}, expected a string")
    if not value.strip():
        raise ValueError(f"{field}: got an empty string, expected a text")
    return check_unicode(value, field)


def _texts(value: object, field: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, field),)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{field}: got {_kind(value)}, expected a list of strings")
    return tuple(_text(v, f"{field}[{i}]") for i, v in enumerate(value))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


_STEMS = {"prompt": ("prompt", "instruct"), "query": ("quer", "question"), "pos": ("pos",), "neg": ("neg",)}
_LIST_IN_A_STRING = re.compile(r"""\s*\[\s*(["']).*\1\s*\]\s*""", re.DOTALL)


def _meant_for(record: Mapping[Any, Any], field: str) -> str | None:
    """The name of a field that holds texts and whose name is similar to that of the missing `field`."""
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
    """What is probably a mistake in a record that can be used."""
    if not isinstance(record, Mapping):
        return
    for field in ("prompt", "neg"):  # a record without one of the others is an error
        other = None if record.get(field) else _meant_for(record, field)
        if other is not None:
            yield f'there is no "{field}", and the field {json.dumps(other[:60])} is ignored: was it meant?'
    for field in ("pos", "neg"):
        value = record.get(field) or ()
        texts = (value,) if isinstance(value, str) else value
        if any("[" in text[:8] and _LIST_IN_A_STRING.fullmatch(text) for text in texts):
            yield f'"{field}" holds a list that is written inside a string: it is taken for one text'


def checked_row(record: object, place: str, problems: Problems, *, instruction: str | None = None) -> Row | None:
    """`parse_row` that reports to `problems` what is wrong (then the result is None) and what is probably a mistake."""
    try:
        row = parse_row(record, instruction=instruction)
    except ValueError as error:
        problems.add(place, error)
        return None
    for doubt in _doubts(record):
        problems.doubt(place, doubt)
    return row


def parse_row(record: object, *, instruction: str | None = None) -> Row:
    """Checks one record of the schema and returns it as a `Row`. Fields other than the four are ignored.

    Args:
        record: "neg" may be missing, null or empty; "pos" and "neg" may be one plain string. A `Row` is checked, too.
        instruction: replaces a "prompt" that is missing or empty; "" if the texts need no instruction.

    Raises:
        ValueError: the record is wrong; the message has the field and the reason.
    """
    if isinstance(record, Row):
        record = dict(zip(_STEMS, (record.instruction, record.query, record.positives, record.negatives), strict=True))
    if not isinstance(record, Mapping):
        raise ValueError(f"got {_kind(record)}, expected an object with the fields prompt, query, pos and neg")
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
        raise ValueError('"pos": got no text, expected one or more')
    negatives = record.get("neg")
    return Row(prompt, query, positives, () if negatives is None or negatives == "" else _texts(negatives, '"neg"'))


def format_passage(instruction: str | None, text: str, template: str = DEFAULT_TEMPLATE) -> str:
    """A positive or negative as the model reads it. It carries the instruction in symmetric tasks only."""
    return format_query(instruction, text, template) if is_symmetric(instruction) else text


def format_row(row: Row, *, positive: int = 0, template: str = DEFAULT_TEMPLATE) -> tuple[str, str, list[str]]:
    """The query, the positive of index `positive`, and all negatives of a row, as the model reads them."""
    negatives = [format_passage(row.instruction, text, template) for text in row.negatives]
    chosen = format_passage(row.instruction, row.positives[positive], template)
    return format_query(row.instruction, row.query, template), chosen, negatives
