"""Sources of rows that need not fit into memory: every row is checked once, then read again when a batch wants it.

A JSONL file is read from front to back, checked line by line, and only an index is kept: 16 bytes a row (24 where the
file has blank lines). Rows are then read by offset. A packed file has no offsets: it is unpacked into an unnamed
temporary file on the way (in TMPDIR), so it needs disk, not memory. A folder of `datasets` is mapped by `datasets`
itself.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from gircse.data.errors import DataError, Problems
from gircse.data.jsonl import MAX_LINE_BYTES, open_jsonl, parse_line, read_lines
from gircse.data.rows import Row, checked_line, checked_row, open_saved, parse_row


class Source(Protocol):
    """Checked rows in a fixed order.

    Attributes:
        name: as in messages.
        fingerprint: hexadecimal; another one means other rows.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Raises DataError if the row is no longer the one that was checked."""
        ...

    def place(self, index: int) -> str:
        """Where a row comes from: "file:line" or "source:row number"."""
        ...


class JsonlSource:
    """The rows of a JSONL file (plain or gzip), by offset.

    Args:
        path: the file. A pipe is kept in a temporary file like a packed one.
        instruction: stands in where "prompt" is missing, see `gircse.data.rows.parse_row`.
        max_line_bytes: a longer line is an error.

    The file stays open: renaming or deleting it changes nothing. Each row carries a checksum (CRC-32), so a file that
    is written to while a run reads it is noticed at the first row that differs.

    Raises:
        DataError: up to 10 bad lines as `file:line: reason`; a file without a row; one that cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self.name = str(path)
        self._instruction = instruction
        starts, lengths, checks, numbers = array("Q"), array("I"), array("I"), array("Q")
        digest = hashlib.blake2b(digest_size=16)
        problems = Problems()
        with open_jsonl(Path(path)) as (file, raw):
            plain = file is raw and stat.S_ISREG(os.fstat(raw.fileno()).st_mode)
            self._file = _own(raw) if plain else tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the source
            written = 0
            for number, offset, content in read_lines(file, Path(path), problems, max_line_bytes=max_line_bytes):
                if checked_line(content, f"{path}:{number}", problems, instruction=instruction) is None:
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
        problems.check()
        if not starts:
            raise DataError([f"{path}: no rows in it"])
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


def _own(file: BinaryIO) -> BinaryIO:
    """The same open file, to be closed apart."""
    return os.fdopen(os.dup(file.fileno()), "rb", buffering=0)


class RecordSource:
    """Rows out of anything that has a length and is indexed: a data set (which stays on disk), a list.

    Raises:
        DataError: up to 10 bad rows as `name:row number: reason` (from 0), or no rows.
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
        problems.check()
        if not len(records):
            raise DataError([f"{name}: no rows in it"])
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def row(self, index: int) -> Row:
        return parse_row(self._records[index], instruction=self._instruction)

    def place(self, index: int) -> str:
        return f"{self.name}:row {index}"


class JoinedSource:
    """Several sources as one, one after the other."""

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


def open_source(path: str | os.PathLike[str], *, instruction: str | None = None) -> Source:
    """A JSONL file, or a folder written by `datasets` (its "train" split, or the only one there is), checked.

    Raises:
        DataError: bad rows by file and line, or something that cannot be read.
    """
    if "\0" not in str(path) and Path(path).is_dir():
        records, name = open_saved(Path(path))
        return RecordSource(name, records, instruction=instruction)
    return JsonlSource(path, instruction=instruction)


def open_sources(paths: Sequence[str | os.PathLike[str]], instructions: Sequence[str] = ()) -> list[Source]:
    """`open_source` of each path with its instruction (or none at all); the problems of all of them in one error."""
    sources: list[Source] = []
    problems = Problems()
    given = instructions or itertools.repeat(None, len(paths))
    for path, instruction in zip(paths, given, strict=True):
        try:
            sources.append(open_source(path, instruction=instruction))
        except DataError as error:  # noqa: PERF203
            problems.merge(error)
    problems.check()
    return sources
