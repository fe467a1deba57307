"""Rows from files and data sets. Each row is checked once, and read again when a batch needs it.

A JSONL file is read from front to back and checked line by line. Only an index is kept: 16 bytes for each row, or 24 if
the file has blank lines. Rows are then read by offset, so the file need not fit into memory. A packed file has no
offsets, so it is unpacked into an unnamed temporary file (in TMPDIR). A folder of `datasets` is mapped by `datasets`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from gircse.data.errors import DataError, Problems
from gircse.data.jsonl import open_jsonl, parse_line, read_lines
from gircse.data.rows import Row, checked_row, parse_row

_Path = str | os.PathLike[str]


class Source(Protocol):
    """Checked rows in a fixed order.

    Attributes:
        name: the name in messages.
        fingerprint: hexadecimal digits that differ if the rows differ.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Raises DataError if the row has changed since it was checked."""
        ...

    def place(self, index: int) -> str:
        """Where a row comes from: "file:line" or "source:row number"."""
        ...


class JsonlSource:
    """The rows of a JSONL file (plain or gzip), read by offset.

    The file stays open, so renaming or deleting it changes nothing. Each row has a checksum (CRC-32), so a file that
    another process writes to is noticed at the first row that differs.

    Args:
        path: the file. The content of a pipe is kept in a temporary file, as that of a packed file.
        instruction: replaces a missing "prompt", see `gircse.data.rows.parse_row`.

    Raises:
        DataError: bad lines, as `file:line: reason`; a file without a row; a file that cannot be read.
    """

    def __init__(self, path: _Path, *, instruction: str | None = None) -> None:
        self.name = str(path)
        self._instruction = instruction
        starts, lengths, checks, numbers = array("Q"), array("I"), array("I"), array("Q")
        digest = hashlib.blake2b(digest_size=16)
        problems = Problems()
        with open_jsonl(Path(path)) as (file, raw):
            plain = file is raw and stat.S_ISREG(os.fstat(raw.fileno()).st_mode)
            self._file = _reopened(raw) if plain else tempfile.TemporaryFile()  # noqa: SIM115 - stays open
            written = 0
            for number, offset, content in read_lines(file, Path(path), problems):
                place = f"{path}:{number}"
                try:
                    record = parse_line(content)
                except ValueError as error:
                    problems.add(place, error)
                    continue
                if checked_row(record, place, problems, instruction=instruction) is None:
                    continue
                if not plain:
                    offset, written = written, written + len(content)
                    self._unpack(content)
                starts.append(offset)
                lengths.append(len(content))
                checks.append(zlib.crc32(content))
                numbers.append(number)
                digest.update(content.strip() + b"\n")
        if not plain:
            self._unpack(b"", flush=True)
        problems.check(self.name, len(starts))
        self._starts, self._lengths = np.frombuffer(starts, np.uint64), np.frombuffer(lengths, np.uint32)
        self._checks = np.frombuffer(checks, np.uint32)
        self._numbers = None if numbers[-1] == len(numbers) else np.frombuffer(numbers, np.uint64)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Row:
        content = os.pread(self._file.fileno(), int(self._lengths[index]), int(self._starts[index]))
        if zlib.crc32(content) != self._checks[index]:
            raise DataError([f"{self.place(index)}: has changed since the data were checked"])
        return parse_row(parse_line(content), instruction=self._instruction)

    def place(self, index: int) -> str:
        return f"{self.name}:{index + 1 if self._numbers is None else self._numbers[index]}"

    def _unpack(self, content: bytes, flush: bool = False) -> None:
        try:
            self._file.write(content)
            if flush:
                self._file.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise DataError(
                [f"{self.name}: cannot be unpacked into {where} (set TMPDIR, or unpack the file): {error.strerror}"]
            ) from None


def _reopened(file: BinaryIO) -> BinaryIO:
    """The same open file under another handle, which stays open when the first is closed."""
    return os.fdopen(os.dup(file.fileno()), "rb", buffering=0)


class RecordSource:
    """Rows out of a sequence of records: a data set that stays on disk, or a list.

    Raises:
        DataError: bad rows, as `name:row number: reason` (from 0), or no rows.
    """

    def __init__(self, name: str, records: Any, *, instruction: str | None = None) -> None:
        self.name, self._records, self._instruction = name, records, instruction
        digest = hashlib.blake2b(digest_size=16)
        problems = Problems()
        for number, record in enumerate(records):
            row = checked_row(record, f"{name}:row {number}", problems, instruction=instruction)
            if row is not None:
                fields = [row.instruction, row.query, row.positives, row.negatives]
                digest.update(json.dumps(fields).encode() + b"\n")
        problems.check(name, len(records))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def row(self, index: int) -> Row:
        return parse_row(self._records[index], instruction=self._instruction)

    def place(self, index: int) -> str:
        return f"{self.name}:row {index}"


class JoinedSource:
    """Several sources, one after the other, as one."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.name = ", ".join(source.name for source in sources)
        self.fingerprint = "-".join(source.fingerprint for source in sources)
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Row:
        source, within = self._find(index)
        return source.row(within)

    def place(self, index: int) -> str:
        source, within = self._find(index)
        return source.place(within)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


def open_source(path: _Path, *, instruction: str | None = None) -> Source:
    """The checked rows of a JSONL file, or of a folder written by `datasets` (its "train" split, or the only one).

    Raises:
        DataError: bad rows with file and line, or a file or folder that cannot be read.
    """
    if "\0" not in str(path) and Path(path).is_dir():
        name, records = _load_saved(str(path))
        return RecordSource(name, records, instruction=instruction)
    return JsonlSource(path, instruction=instruction)


def _load_saved(path: str) -> tuple[str, Any]:
    """The name in messages and the records of a folder that `datasets` wrote (save_to_disk)."""
    try:
        import datasets
    except ImportError:
        raise DataError([f"{path}: a folder is read with `datasets`, which is missing: pip install datasets"]) from None
    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # a broken folder makes pyarrow and json raise errors of many kinds
        raise DataError([f"{path}: no data set written by save_to_disk: {error}"]) from error
    if not isinstance(saved, Mapping):  # a datasets.DatasetDict is a mapping of splits
        return path, saved
    names = [str(name) for name in saved]
    name = "train" if "train" in names else names[0] if len(names) == 1 else None
    if name is None:
        raise DataError([f'{path}: got the splits {", ".join(names) or "(none)"}, expected "train" or a single one'])
    return f"{path}[{name}]", saved[name]


def open_sources(paths: Sequence[_Path], instructions: Sequence[str | None] = ()) -> list[Source]:
    """`open_source` of each path with its instruction (or none for any); one error has the problems of all of them."""
    sources: list[Source] = []
    problems = Problems()
    for path, instruction in zip(paths, instructions or itertools.repeat(None, len(paths)), strict=True):
        try:
            sources.append(open_source(path, instruction=instruction))
        except DataError as error:  # noqa: PERF203
            problems.merge(error)
    problems.check("data", len(paths))
    return sources


def load_rows(paths: _Path | Sequence[_Path], *, instruction: str | None = None) -> list[Row]:
    """All rows of one path or of several, in memory; paths and errors are those of `open_sources`."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    sources = open_sources(paths, [instruction] * len(paths))
    return [source.row(index) for source in sources for index in range(len(source))]
