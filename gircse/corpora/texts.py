"""The texts of files of any kind, one after the other, without their other columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from gircse.corpora.objects import find_files, kind_of
from gircse.corpora.part import Part
from gircse.encode.files import BLOCK, read_texts


def read_corpus(inputs: Sequence[str], column: str, part: Part, rows_per_task: int) -> Iterator[list[str]]:
    """Yields blocks of the texts in a share of the files; "-" alone is standard input.

    Lines of text and JSON Lines need no pyarrow.

    Raises:
        ValueError: a row has no text; standard input is to be shared.
        OSError: there is no such file.
    """
    if list(inputs) == ["-"]:
        if part.count > 1:
            raise ValueError("input: got - (standard input) with --part, expected files, which are counted first")
        yield from read_texts("-", field=column)
        return
    files = find_files(inputs)
    blocks = _blocks(files, column)
    if part.count > 1:
        rows = part.of_rows(sum(map(len, _blocks(files, column))), rows_per_task)
        share = islice(chain.from_iterable(blocks), rows.start, rows.stop)
        blocks = iter(lambda: list(islice(share, BLOCK)), [])
    yield from blocks


def _blocks(files: list[str], column: str) -> Iterator[list[str]]:
    for file in files:
        if kind_of(file) == "parquet":
            from gircse.corpora.sources import read_column

            yield from read_column(file, column)
        else:
            yield from read_texts(file, field=column)
