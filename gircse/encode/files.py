"""Files of texts in, files of embeddings out, a block at a time."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np

from gircse.data.jsonl import check_unicode
from gircse.files.atomic import new_file

BLOCK = 2048  # texts held at once


def read_texts(path: str, *, field: str = "text", block: int = BLOCK) -> Iterator[list[str]]:
    """Yields blocks of texts: lines of a text file, or `field` of the objects (or the strings) of a .jsonl file; UTF-8
    with or without a byte order mark.

    Raises:
        ValueError: a line that is not UTF-8, no JSON, or has no such string; names file and line. OSError: no such
            file.
    """
    with _open(path) as file:
        lines = _numbered(file, path)
        texts = _jsonl_texts(lines, path, field) if path.endswith(".jsonl") else (line for _, line in lines)
        while chunk := list(islice(texts, block)):
            yield chunk


def check_output(path: str) -> None:
    """Raises ValueError unless the name ends in .npy or .jsonl."""
    if Path(path).suffix not in (".npy", ".jsonl"):
        raise ValueError(f"output: got {path!r}, expected a name that ends in .npy or .jsonl")


@contextmanager
def embedding_writer(path: str) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends a block of embeddings [b, ..]; the file appears whole, at the end."""
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


def save_array(path: Path, array: np.ndarray) -> None:
    """As float32 in a .npy file. `np.save` writes through C's buffers, and does not say when the disk is full."""
    with _npy_writer(path) as write:
        write(array)


@contextmanager
def _npy_writer(partial: Path) -> Iterator[Callable[[np.ndarray], None]]:
    shape: tuple[int, ...] = (0, 0)
    with partial.open("wb") as file:
        # numpy leaves room in the header for the first axis to grow, so it can be written again at the end
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
    # bytes that are not UTF-8 come as lone surrogates: then it is known in which line they are
    if path != "-":
        return open(path, encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return nullcontext(sys.stdin)


def _numbered(file: Iterable[str], path: str) -> Iterator[tuple[int, str]]:
    """(number, line without its end), from 1."""
    for number, line in enumerate(file, start=1):
        if number == 1 and line.startswith("\ufeff"):
            line = line[1:]
            if not line:  # a file of nothing but the mark has no line
                return
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8, at character {error.start + 1}") from None
        yield number, line.rstrip("\r\n")


def _jsonl_texts(lines: Iterable[tuple[int, str]], path: str, field: str) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nesting
            raise ValueError(f"{path}:{number}: not JSON that can be read: {error}") from None
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: expected an object with a string in {field!r}, or a string")
        yield check_unicode(text, f"{path}:{number}: {field!r}")
