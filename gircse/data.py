"""A user's own data: rows (instruction, query, positives, negatives), how they are written for the model, and their
order.

The schema is that of `cfli/bge-full-data` (SPEC 1.6): {"prompt": str, "query": str, "pos": [str, ...], "neg": [str,
...]}. Everything is checked before anything starts: a training run never dies at row 180,000 because of a typing
error.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np

from gircse.prompts import DEFAULT_TEMPLATE, format_query, is_symmetric

MAX_REPORTED = 10
MAX_LINE_BYTES = 64 * 2**20  # a line beyond it is a mistake, and would otherwise be read into memory whole


class DataError(ValueError):
    """Data that cannot be used. `problems` are the first ones, one line each; `total` counts all of them."""

    def __init__(self, problems: Iterable[str], total: int | None = None) -> None:
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        more = self.total - len(self.problems)
        super().__init__("\n".join(self.problems) + (f"\nand {more} more" if more else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # survives the way back from a worker process
        return type(self), (self.problems, self.total)


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
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} has a lone surrogate at character {error.start}, which is no Unicode text") from None
    return value


def _texts(value: object, field: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, field),)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{field} must be a list of strings, got {_kind(value)}")
    return tuple(_text(v, f"{field}[{i}]") for i, v in enumerate(value))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


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
            raise ValueError('the field "prompt" is missing')
        prompt = _text(prompt, '"prompt"')
    for field in ("query", "pos"):
        if field not in record:
            raise ValueError(f'the field "{field}" is missing')
    query = _text(record["query"], '"query"')
    positives = _texts(record["pos"], '"pos"')
    if not positives:
        raise ValueError('"pos" is empty: a row needs at least one positive')
    negatives = record.get("neg")
    return Row(prompt, query, positives, () if negatives is None or negatives == "" else _texts(negatives, '"neg"'))


# ---------------------------------------------------------------- files


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) != len(items):
        names = [name for name, _ in items]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {json.dumps(twice[:60])} occurs more than once")
    return record


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def _parse_line(line: bytes) -> object:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if they are gzip: told by the content, because names lie."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise DataError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise DataError([f"{path}: is a directory, expected a JSONL file"]) from None
    except (OSError, ValueError) as error:
        raise DataError([f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    with raw:
        try:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
        except OSError as error:
            raise DataError([f"{path}: cannot be read: {error.strerror or error}"]) from None
        if packed:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield raw


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is longer than `max_bytes`, which is passed over without being kept."""
    while line := file.readline(max_bytes + 1):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(max_bytes)
            yield None
        else:
            yield line


class _Problems:
    """Keeps the first few problems and counts the rest."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.total = 0

    def add(self, place: str, reason: object) -> None:
        self.total += 1
        if len(self.first) < MAX_REPORTED:
            self.first.append(f"{place}: {reason}")

    def merge(self, error: DataError) -> None:
        self.total += error.total
        self.first = [*self.first, *error.problems][:MAX_REPORTED]

    def check(self) -> None:
        if self.total:
            raise DataError(self.first, self.total)


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
    problems = _Problems()
    number = 0
    with _open(path) as file:
        lines = _lines(file, max_line_bytes)
        while True:
            try:
                line = next(lines, b"")
            except (EOFError, OSError, zlib.error) as error:  # what was read so far may be good: the file is not
                problems.add(f"{path}:{number + 1}", f"cannot be read on from here: {str(error) or 'broken file'}")
                break
            if line == b"":
                break
            number += 1
            try:
                if line is None:
                    raise ValueError(f"the line is longer than {max_line_bytes:,} bytes")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.strip()
                if line:
                    rows.append(parse_row(_parse_line(line), instruction=instruction))
            except ValueError as error:
                problems.add(f"{path}:{number}", error)
    problems.check()
    if not rows:
        raise DataError([f"{path}: no rows in it"])
    return rows


def _load_saved(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError([f"{path}: a folder is read with `datasets`, which is missing: pip install datasets"]) from None
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken or foreign folder makes pyarrow and json raise
        raise DataError([f"{path}: no data set written by save_to_disk: {error}"]) from error


def _load_all(paths: Sequence[str | os.PathLike[str]], instruction: str | None, split: str | None) -> list[Row]:
    """The rows of several files or folders, one after the other; the problems of all of them in one error."""
    rows: list[Row] = []
    problems = _Problems()
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
    label = "rows"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        label = str(path)
        if "\0" in label or not path.is_dir():
            return read_jsonl(path, instruction=instruction)
        source = _load_saved(path)
    if isinstance(source, Mapping):  # also datasets.DatasetDict
        names = [str(name) for name in source]
        name = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if name is None or name not in names:
            asked = "choose one with split=" if name is None else f"there is no {name!r}"
            raise DataError([f"{label}: has the splits {', '.join(names) or '(none)'}: {asked}"])
        source, label = source[name], f"{label}[{name}]"
    elif split is not None:
        raise DataError([f"{label}: has no splits, but split={split!r} was asked for"])
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise DataError([f"{label}: expected a path, a data set or a list of objects, got {_kind(source)}"])
    rows: list[Row] = []
    problems = _Problems()
    for number, record in enumerate(source):
        try:
            rows.append(parse_row(record, instruction=instruction))
        except ValueError as error:  # noqa: PERF203
            problems.add(f"{label}:row {number}", error)
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


# ---------------------------------------------------------------- the order of rows


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), a bijection of uint64: well-mixed bits out of counters."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _keys(count: int, *path: int) -> np.ndarray:
    """`count` uint64 random keys that depend on `path` alone; numpy's generators may change with its version."""
    state = np.zeros(1, np.uint64)
    for part in path:
        state = _mix(_mix(state + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(part % 2**64))
    return _mix(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


_ORDER, _POSITIVE, _NEGATIVE = range(3)  # separate streams of the same seed


class BatchSampler:
    """Which rows make up the batch of a step: a pure function of (seed, step), so that a run resumes at any step
    exactly.

    Every epoch is a new permutation of all rows; the rows left over at its end (fewer than a batch) are dropped.
    Raises ValueError if there are fewer rows than one batch needs.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_rows < batch_size:
            raise ValueError(f"a batch needs {batch_size} rows, the data has {num_rows}")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.steps_per_epoch = num_rows // batch_size
        self._order: tuple[int, np.ndarray] | None = None  # the epoch at hand: a cache, not a state

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that a step (from 0) belongs to."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """The `batch_size` distinct row indices of a step (from 0)."""
        epoch = self.epoch(step)
        cached = self._order
        if cached is None or cached[0] != epoch:
            order = np.argsort(_keys(self.num_rows, self.seed, _ORDER, epoch), kind="stable")
            self._order = cached = (epoch, order)
        start = (step - epoch * self.steps_per_epoch) * self.batch_size
        return cached[1][start : start + self.batch_size].tolist()

    def positive(self, step: int, index: int, count: int) -> int:
        """Which of the `count` positives of row `index` is used in a step; another draw in every epoch."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return int(np.argmin(_keys(count, self.seed, _POSITIVE, self.epoch(step), index)))

    def negatives(self, step: int, index: int, count: int, wanted: int) -> list[int]:
        """Which min(wanted, count) distinct ones of the `count` negatives of row `index` are used in a step."""
        order = np.argsort(_keys(count, self.seed, _NEGATIVE, self.epoch(step), index), kind="stable")
        return order[: max(wanted, 0)].tolist()
