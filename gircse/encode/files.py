"""Reads files of texts and writes files of embeddings, a block at a time."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gircse.data.jsonl import check_unicode
from gircse.files.atomic import new_file

BLOCK = 2048  # number of texts held at once


def read_texts(path: str, *, field: str = "text", block: int = BLOCK) -> Iterator[list[str]]:
    """Yields blocks of texts: lines of a text file, or `field` of the objects (or the strings) of a .jsonl file; UTF-8
    with or without a byte order mark.

    Raises:
        ValueError: a line is not UTF-8 or not JSON, or has no such string; the message names file and line. OSError:
            there is no such file.
    """
    texts = _jsonl_texts(path, field) if path.endswith(".jsonl") else (line for _, line in read_lines(path))
    while chunk := list(islice(texts, block)):
        yield chunk


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a file as (number from 1, line without its end).

    Raises:
        ValueError: a line is not UTF-8. OSError: there is no such file.
    """
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith("\ufeff"):
                line = line[1:]
                if not line:  # the file holds only the mark
                    return
            try:
                line.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8, at character {error.start + 1}") from None
            yield number, line.rstrip("\r\n")


def read_json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """The values of a .jsonl file as (number of the line from 1, value); empty lines are left out.

    Raises:
        ValueError: a line is not UTF-8 or not JSON. OSError: there is no such file.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # thousands of digits, or deep nesting
            raise ValueError(f"{path}:{number}: not JSON that can be read: {error}") from None


def check_output(path: str) -> None:
    """Raises ValueError unless the name ends in .npy or .jsonl."""
    if Path(path).suffix not in (".npy", ".jsonl"):
        raise ValueError(f"output: got {path!r}, expected a name that ends in .npy or .jsonl")


@contextmanager
def embedding_writer(path: str) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends a block of embeddings [b, ..]. The complete file appears at the end."""
    check_output(path)
    with new_file(Path(path)) as partial:
        if Path(path).suffix == ".npy":
            with _npy_writer(partial) as write:
                yield write
        else:
            with partial.open("w", encoding="utf-8") as file:

                def write_lines(block: np.ndarray) -> None:
                    file.writelines(json.dumps({"embedding": row.tolist()}) + "\n" for row in block)

                yield write_lines


@contextmanager
def _npy_writer(partial: Path) -> Iterator[Callable[[np.ndarray], None]]:
    shape: tuple[int, ...] = (0, 0)
    with partial.open("wb") as file:
        # numpy leaves room in the header for a longer first axis, so the header can be written again at the end.
        def header() -> None:
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
            )

        def write(block: np.ndarray) -> None:
            nonlocal shape
            if shape == (0, 0):
                shape = (0, *block.shape[1:])
                header()
            shape = (shape[0] + len(block), *shape[1:])
            file.write(np.ascontiguousarray(block, dtype=np.float32).tobytes())

        yield write
        header()


def _open(path: str):
    # Bytes that are not UTF-8 become lone surrogates, so that the error can name their line.
    if "://" in path:
        import fsspec

        return fsspec.open(path, "r", encoding="utf-8", errors="surrogateescape")
    if path != "-":
        return open(path, encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return nullcontext(sys.stdin)


def _jsonl_texts(path: str, field: str) -> Iterator[str]:
    for number, value in read_json_lines(path):
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: expected an object with a string in {field!r}, or a string")
        yield check_unicode(text, f"{path}:{number}: {field!r}")
