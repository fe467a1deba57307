"""Files of texts, local or by URL, as tables of a fixed number of rows: Parquet, JSON Lines, lines of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gircse.corpora.columns import texts_of
from gircse.corpora.objects import find_files, kind_of, place
from gircse.encode.files import read_json_lines, read_lines

_HASHED_BYTES = 64 * 2**10
_BLOCK = 2048


@dataclass(frozen=True)
class Source:
    """Rows of files of one kind, one file after the other.

    Attributes:
        kind: "parquet", "jsonl" or "text".
        rows: how many each file has.
        schema: of every table.
        column: the column that lines of text, and strings in JSON Lines, are.
    """

    files: list[str]
    kind: str
    rows: list[int]
    schema: pa.Schema
    column: str

    @classmethod
    def of(cls, inputs: Sequence[str], column: str) -> Source:
        """Looks at all files: at the footer of Parquet, at every line of the other kinds.

        Raises:
            ValueError: files of several kinds or with other columns, a bad line. OSError: there is no such file.
        """
        files = find_files(inputs)
        kind = kind_of(files[0])
        rows: list[int] = []
        schemas: list[pa.Schema] = []
        for file in files:
            count, schema = _look(file, kind, column)
            rows.append(count)
            if kind == "parquet" and schemas and not schema.equals(schemas[0]):
                raise ValueError(f"input: {file} has other columns than {files[0]}, expected the same names and types")
            schemas.append(schema)
        schema = schemas[0] if kind == "parquet" else _unified(schemas, files)
        return cls(files, kind, rows, schema, column)

    @property
    def total(self) -> int:
        return sum(self.rows)

    def identity(self) -> list[list[Any]]:
        """For each file its name, its size and a hash of its beginning, and of Parquet's end, where the sizes and the
        extremes of all its columns are (the whole may be terabytes)."""
        return [identity_of(file) for file in self.files]

    def tables(self, rows: range, size: int) -> Iterator[pa.Table]:
        """These rows in tables of `size`, the last one of what is left. Without any row: one empty table.

        Raises:
            ValueError: the files have become shorter.
        """
        if not rows:
            yield self.schema.empty_table()
            return
        done = 0
        for table in _of_size(self._pieces(rows), size):
            done += len(table)
            yield table
        if done < len(rows):
            raise ValueError(f"input: the files have become shorter, expected {self.total} rows as at the start")

    def _pieces(self, rows: range) -> Iterator[pa.Table]:
        first = 0
        for file, count in zip(self.files, self.rows, strict=True):
            skip, stop = max(rows.start - first, 0), min(rows.stop - first, count)
            if skip < stop:
                yield from self._of_file(file, skip, stop)
            first += count

    def _of_file(self, file: str, start: int, stop: int) -> Iterator[pa.Table]:
        if self.kind == "parquet":
            yield from _parquet_rows(file, start, stop, self.schema)
        elif self.kind == "jsonl":
            values = islice(read_json_lines(file), start, stop)
            while block := list(islice(values, _BLOCK)):
                yield _json_table(block, file, self.column, self.schema)
        else:
            lines = islice(read_lines(file), start, stop)
            while texts := [line for _, line in islice(lines, _BLOCK)]:
                yield pa.table({self.column: pa.array(texts, pa.string())})


def identity_of(file: str) -> list[Any]:
    system, path = place(file)
    size = system.size(path)
    with system.open(path, "rb") as opened:
        digest = hashlib.sha256(opened.read(_HASHED_BYTES))
        if kind_of(file) == "parquet":
            opened.seek(max(0, size - _HASHED_BYTES))
            digest.update(opened.read())
    return [file, size, digest.hexdigest()]


def read_column(file: str, column: str) -> Iterator[list[str]]:
    """Blocks of the texts in a column of a Parquet file.

    Raises:
        ValueError: there is no such column, or a row without a text. TypeError: the column does not hold strings.
    """
    system, path = place(file)
    first = 0
    with system.open(path, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
        if column not in parquet.schema_arrow.names:
            names = ", ".join(parquet.schema_arrow.names)
            raise ValueError(f"column: got {column!r}, expected one of {names} of {file}")
        for batch in parquet.iter_batches(_BLOCK, columns=[column]):
            texts, reasons = texts_of(column, pa.chunked_array([batch.column(0)]))
            if None in texts:
                row = texts.index(None)
                why = reasons.get(row, "null")
                raise ValueError(
                    f"{file}: row {first + row} has no text in {column!r} ({why}); only Parquet can say so"
                )
            yield [text for text in texts if text is not None]
            first += len(texts)


def _look(file: str, kind: str, column: str) -> tuple[int, pa.Schema]:
    if kind == "parquet":
        system, path = place(file)
        with system.open(path, "rb") as opened, pq.ParquetFile(opened) as parquet:
            return parquet.metadata.num_rows, parquet.schema_arrow
    if kind == "text":
        return sum(1 for _ in read_lines(file)), pa.schema([(column, pa.string())])
    count, schema = 0, pa.schema([])
    values = read_json_lines(file)
    while block := list(islice(values, _BLOCK)):
        count += len(block)
        schema = _unified([schema, _json_table(block, file, column).schema], [file])
    return count, schema


def _unified(schemas: list[pa.Schema], files: list[str]) -> pa.Schema:
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"input: a field of {files[-1]} has values of several types: {error}") from None


def _json_table(block: list[tuple[int, Any]], file: str, column: str, schema: pa.Schema | None = None) -> pa.Table:
    """Objects, or strings, which are the column."""
    rows = [value if isinstance(value, dict) else {column: value} for _, value in block]
    # `from_pylist` would take the names of the first row only
    names = list(dict.fromkeys(chain.from_iterable(rows))) if schema is None else schema.names
    try:
        if not all(isinstance(value, (dict, str)) for _, value in block):
            raise ValueError("expected an object or a string")
        columns = [
            pa.array([row.get(name) for row in rows], None if schema is None else schema.field(name).type)
            for name in names
        ]
        return pa.table(columns, schema=schema) if schema is not None else pa.table(columns, names=names)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if len(block) > 1 and schema is None:
            for one in block:  # finds the line
                _json_table([one], file, column)
        raise ValueError(f"{file}:{block[0][0]}: {error}") from None


def _parquet_rows(file: str, start: int, stop: int, schema: pa.Schema) -> Iterator[pa.Table]:
    system, path = place(file)
    with system.open(path, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
        first, groups, before = 0, [], 0
        for group in range(parquet.metadata.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if first + count <= start:
                before = first + count
            elif first < stop:
                groups.append(group)
            first += count
        for batch in parquet.iter_batches(_BLOCK, row_groups=groups):
            kept = batch[max(start - before, 0) : max(stop - before, 0)]
            before += len(batch)
            if len(kept):
                yield pa.Table.from_batches([kept]).cast(schema)


def _of_size(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        if count >= size:
            whole = pa.concat_tables(waiting)
            full = count - count % size
            yield from (whole[first : first + size] for first in range(0, full, size))
            waiting, count = [whole[full:]], count - full
    if count:
        yield pa.concat_tables(waiting)
