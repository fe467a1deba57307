"""Files of texts in, files of embeddings out, a block at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from gircse.atomic import new_file

BLOCK = 2048  # texts held at once


def read_texts(path: str, *, field: str = "text", block: int = BLOCK) -> Iterator[list[str]]:
    """Yields blocks of texts: lines of a text file, or `field` of the objects (or the strings) of a .jsonl file.

    Raises:
        ValueError: a line that is no JSON, or has no such string; names file and line. OSError: no such file.
    """
    with _open(path) as file:
        texts = _jsonl_texts(file, path, field) if path.endswith(".jsonl") else (line.rstrip("\r\n") for line in file)
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
    return sys.stdin if path == "-" else open(path, encoding="utf-8")


def _jsonl_texts(lines, path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: expected an object with a string in {field!r}, or a string")
        yield text
