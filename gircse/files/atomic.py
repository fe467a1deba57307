"""Files and folders that appear whole or not at all: each is written beside its place and then renamed.

What a killed process leaves has a name that begins with a dot and holds `.partial`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; when the block ends well it becomes `path`, which must not exist yet.

    If the block raises, or the process dies, `path` does not appear. If another process was first, its folder stays.
    """
    path = Path(path)
    with _partial_folder(path) as partial:
        yield partial
        _sync_tree(partial)
        partial.chmod(0o777 & ~_umask())
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        _sync(path.parent)


@contextmanager
def into_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; when the block ends well its files are moved into `path`, one by one.

    Each file is replaced atomically, and other files in `path` stay. If the block raises, `path` is not changed.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"path: {path} is a file, expected a folder or a new name")
    with _partial_folder(path) as partial:
        yield partial
        _sync_tree(partial)
        for source in sorted(p for p in partial.rglob("*") if p.is_file()):
            target = path / source.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        _sync(path)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; when the block ends well that file replaces `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Deletes a folder. It is renamed first, because a reader would take a half-deleted folder for a whole one."""
    away = path.with_name(f".{path.name}.partial")  # one name, so that the next call clears what a killed one left
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half-written in `folder`. Only the one process that writes there may call it,
    because it would delete what another one is writing."""
    for path in folder.glob(".*.partial*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, deleted at the end unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
