"""Files of texts to Parquet in this process, in bounded memory; killed and started again it encodes what is missing.

    FOLDER/rows-000000004096.parquet    a block of rows with their embeddings, named by its first row in the input
    FOLDER/.gircse/job.json             the settings that decide the result

Every block is written whole or not at all, so one that is there is finished, whoever wrote it. A share of the corpus
(`Part`) is a range of blocks: commands for several shares may write into one folder without knowing of each other. A
single file `out.parquet` has its blocks in `.out.parquet.gircse/` until all are there and are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from gircse.corpora.columns import texts_of
from gircse.corpora.job import ROWS_PER_TASK, WINDOW, EncodeJob
from gircse.corpora.manifest import begin, forget_if_empty
from gircse.corpora.objects import is_local, new_object, place, remove
from gircse.corpora.part import WHOLE, Part
from gircse.corpora.sources import Source
from gircse.files.lock import folder_lock
from gircse.integers import check_integer

if TYPE_CHECKING:
    from gircse.corpora.text_encoder import TextEncoder


@dataclass(frozen=True)
class Report:
    """How many rows the share has, and how many of them this call encoded."""

    rows: int
    encoded: int


def encode_files(
    source: Source,
    output: str,
    job: EncodeJob,
    *,
    part: Part = WHOLE,
    rows_per_task: int = ROWS_PER_TASK,
    update: Callable[[int], object] = lambda rows: None,
) -> Report:
    """Encodes the rows of a share that are missing. Nothing is loaded if none is.

    Args:
        output: a folder, or a name that ends in .parquet, on a disk or by URL.
        part: which share of the rows.
        rows_per_task: rows of a file in a folder, and the most that are encoded again after a kill.
        update: is called with a number of further rows that are there.

    Raises:
        ValueError: columns that do not fit, other settings than the output was begun with, a row that cannot be
            encoded.
        gircse.files.lock.FolderInUse: another process writes the same file.
    """
    check_integer("rows_per_task", rows_per_task, least=1)
    check_source(source, job)
    single = output.endswith(".parquet")
    folder = _folder_of_blocks(output) if single else output.rstrip("/")
    settings = {**job.settings(), "input": source.identity(), "rows_per_task": rows_per_task, "by": "blocks of rows"}
    if single:
        settings["part"] = f"{part.index}/{part.count}"
    with folder_lock(folder) if single and is_local(folder) else nullcontext():
        begin(folder, settings)
        numbers = list(part.of_blocks(source.total, rows_per_task))
        if single and not numbers:
            numbers = [source.total]  # beyond the last one: a share without rows still gives a file, which is empty
        blocks = [_Block(folder, number, rows_per_task, source) for number in numbers]
        try:
            encoded = _encode_missing(blocks, job, update)
        except BaseException:
            if single or part == WHOLE:  # else commands for other shares go by these settings
                forget_if_empty(folder)  # so that settings that were wrong can be set right
            raise
        begin(folder, settings)  # nobody else has begun it anew meanwhile
        if single:
            _write(output, _tables_of(blocks))
            remove(folder)
    return Report(sum(len(block.rows) for block in blocks), encoded)


def check_source(source: Source, job: EncodeJob) -> None:
    """
    Raises:
        ValueError: a column is missing, or a result is there already. TypeError: a column does not hold strings.
    """
    job.check_columns(source.schema.names)
    for column in job.columns:
        texts_of(column, pa.chunked_array([], source.schema.field(column).type))


class _Block:
    """Rows that become one file."""

    def __init__(self, folder: str, number: int, size: int, source: Source) -> None:
        self.rows = range(min(number * size, source.total), min((number + 1) * size, source.total))
        self.url = f"{folder}/rows-{self.rows.start:012d}.parquet"
        self.source = source

    def is_there(self) -> bool:
        system, path = place(self.url)
        return bool(system.isfile(path))

    def encoded(self, encoder: TextEncoder) -> Iterator[pa.Table]:
        first = self.rows.start
        for table in self.source.tables(self.rows, WINDOW):
            yield encoder(table, first)
            first += len(table)


def _encode_missing(blocks: list[_Block], job: EncodeJob, update: Callable[[int], object]) -> int:
    encoder: TextEncoder | None = None
    encoded = 0
    for block in blocks:
        if not block.is_there():
            if encoder is None:
                from gircse.corpora.text_encoder import TextEncoder  # PyTorch, which a driver of Ray does without

                encoder = TextEncoder(job)
            _write(block.url, block.encoded(encoder), update)
            encoded += len(block.rows)
        else:
            update(len(block.rows))
    return encoded


def _write(url: str, tables: Iterator[pa.Table], update: Callable[[int], object] = lambda rows: None) -> None:
    first = next(tables)
    with new_object(url) as file, pq.ParquetWriter(file, first.schema) as writer:
        table: pa.Table | None = first
        while table is not None:
            writer.write_table(table)
            update(len(table))
            table = next(tables, None)


def _folder_of_blocks(output: str) -> str:
    parent, slash, name = output.rpartition("/")
    return f"{parent}{slash}.{name}.gircse"


def _tables_of(blocks: list[_Block]) -> Iterator[pa.Table]:
    for block in blocks:
        system, path = place(block.url)
        with system.open(path, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
            if not block.rows:
                yield parquet.schema_arrow.empty_table()
            for group in range(parquet.metadata.num_row_groups):
                yield parquet.read_row_group(group)
