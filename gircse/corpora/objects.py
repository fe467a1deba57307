"""Files and folders, on a disk or by URL (fsspec): found, and written so that they appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gircse.files.atomic import new_file

_PARQUET = (".parquet", ".pq")
_JSONL = (".jsonl",)


def place(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it; a path on a disk becomes a whole one."""
    return fsspec.core.url_to_fs(url)


def is_local(url: str) -> bool:
    return isinstance(place(url)[0], LocalFileSystem)


def kind_of(file: str) -> str:
    """ "parquet", "jsonl" or "text", by the end of the name."""
    return "parquet" if file.endswith(_PARQUET) else "jsonl" if file.endswith(_JSONL) else "text"


def find_files(inputs: Sequence[str]) -> list[str]:
    """The files that paths, URLs, patterns with `*` and folders name, sorted within each of these.

    Of a folder the Parquet and JSON Lines files count whose names, and whose folders' names, begin with neither a dot
    nor an underscore.

    Raises:
        FileNotFoundError: nothing is there. ValueError: a file is named twice, or the files are of several kinds.
    """
    found: list[str] = []
    for name in inputs:
        system, path = place(name)
        if system.isfile(path):
            paths = [path]
        elif system.isdir(path):
            paths = [
                p for p in system.find(path) if p.endswith((*_PARQUET, *_JSONL)) and not _is_hidden(p[len(path) :])
            ]
        else:
            paths = [p for p in system.glob(path) if system.isfile(p)] if "*" in name else []
        if not paths:
            raise FileNotFoundError(f"input: {name}: No such file, nor a folder or pattern of such files")
        found += [p if isinstance(system, LocalFileSystem) else system.unstrip_protocol(p) for p in sorted(paths)]
    if doubled := {name for name in found if found.count(name) > 1}:
        raise ValueError(f"input: got {min(doubled)} twice, expected each file once")
    kind, *others = sorted({kind_of(file) for file in found})
    if others:
        raise ValueError(f"input: got files of the kinds {kind} and {others[0]}, expected one kind")
    return found


def remove(folder: str) -> None:
    system, path = place(folder)
    system.rm(path, recursive=True)


def visible(folder: str) -> list[str]:
    """The names in a folder, but for those that begin with a dot; none where there is no folder."""
    system, path = place(folder)
    if not system.isdir(path):
        return []
    system.invalidate_cache(path)
    # Some object stores list a marker of the folder itself.
    entries = [entry.rstrip("/") for entry in system.ls(path, detail=False)]
    names = [entry.rpartition("/")[2] for entry in entries if entry != path.rstrip("/")]
    return sorted(name for name in names if not name.startswith("."))


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


@contextmanager
def new_object(url: str) -> Iterator[Any]:
    """Yields a binary file to write to. It appears under its name when the block ends well, and not otherwise."""
    system, path = place(url)
    if isinstance(system, LocalFileSystem):
        with new_file(Path(path)) as partial, partial.open("wb") as file:
            yield file
    else:
        with system.transaction, system.open(path, "wb") as file:
            yield file
