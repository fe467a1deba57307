"""A folder of shards: which texts each holds, which are there, who is at one, and how they become one file.

The layout and what a process may rely on is described in `gircse.encode.sharded`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gircse.encode.files import BLOCK, embedding_writer, save_array
from gircse.files.atomic import new_file, new_folder
from gircse.files.lock import try_lock
from gircse.integers import check_integer

MANIFEST = "manifest.json"
_MAX_NAMED = 8


@dataclass(frozen=True)
class Shards:
    """The shards of a folder: which texts they hold, and which are there."""

    folder: Path
    texts: int
    shard_size: int

    @classmethod
    def of_manifest(cls, folder: Path, manifest: dict[str, Any]) -> Shards:
        return cls(folder, manifest["texts"], manifest["settings"]["shard_size"])

    @property
    def count(self) -> int:
        """At least 1: the shard of no texts tells the dimension."""
        return max(1, math.ceil(self.texts / self.shard_size))

    def size(self, s: int) -> int:
        return min(self.shard_size, self.texts - s * self.shard_size)

    def path(self, s: int) -> Path:
        return self.folder / f"shard-{s:06d}.npy"

    def is_whole(self, s: int) -> bool:
        """Whether the file is there, holds as many embeddings as it should, and is as long as its header says."""
        try:
            with self.path(s).open("rb") as file:
                try:
                    np.lib.format.read_magic(file)
                    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
                except Exception:  # whatever a damaged header provokes
                    return False
                size = file.tell() + math.prod(shape) * dtype.itemsize
                whole = len(shape) > 1 and shape[0] == self.size(s) and dtype == np.float32 and not fortran_order
                return whole and size == os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False

    def write(self, s: int, embeddings: np.ndarray) -> None:
        if embeddings.ndim < 2 or len(embeddings) != self.size(s):
            raise ValueError(f"encode: got shape {list(embeddings.shape)}, expected [{self.size(s)}, D]")
        with new_file(self.path(s)) as partial:
            save_array(partial, embeddings)

    @contextmanager
    def lock(self, s: int) -> Iterator[bool]:
        """Yields whether this process has the shard to itself. The kernel frees the lock of a process that is killed.

        The file is removed once the shard is there. A process that still waits for the removed file gets a lock that
        keeps nobody out, but looks for the shard after it, and finds it.
        """
        path = self.path(s).with_suffix(".lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            mine = try_lock(handle)
            yield mine
            if mine:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def begin(folder: Path, settings: dict[str, Any], count: Callable[[], int]) -> Shards:
    """The folder with its manifest: as it is if the settings are the same, else new.

    The folder appears with the manifest inside, so of processes that start at the same time one settles it for all.
    """
    if not (folder / MANIFEST).is_file():
        # another process may have made it a moment ago: then it has a manifest now
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise ValueError(f"output: {folder} has files but no {MANIFEST}, expected a new or empty folder")
        texts = count()  # also finds a bad line, before anything is written
        with new_folder(folder) as partial:
            shards = Shards(folder, texts, settings["shard_size"])
            _write_manifest(partial, settings, shards, complete=False)
    manifest = _read_manifest(folder)
    begun, wanted = manifest["settings"], json.loads(json.dumps(settings))
    different = [
        f"{name}: {folder} was begun with {begun.get(name)!r}, got {wanted.get(name)!r}"
        for name in (*wanted, *(begun.keys() - wanted.keys()))
        if begun.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError("; ".join(different) + "; expected the same to go on (or remove the folder to begin anew)")
    return Shards.of_manifest(folder, manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_integer("shard_size", manifest["settings"]["shard_size"], least=1)
        check_integer("texts", manifest["texts"], least=0)
    except FileNotFoundError:
        raise ValueError(f"folder: {folder} has no {MANIFEST}, expected a folder of shards") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"folder: {folder / MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    return manifest


def _write_manifest(folder: Path, settings: dict[str, Any], shards: Shards, *, complete: bool) -> None:
    manifest = {"settings": settings, "texts": shards.texts, "shards": shards.count, "complete": complete}
    with new_file(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def complete_folder(shards: Shards) -> None:
    """All shards are there: says so, and clears away what killed processes left."""
    manifest = _read_manifest(shards.folder)
    if not manifest.get("complete"):
        _write_manifest(shards.folder, manifest["settings"], shards, complete=True)
    for left in (*shards.folder.glob(".shard-*.partial.npy"), *shards.folder.glob("shard-*.lock")):
        left.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """At once for everybody who looks, and never half: a half would be taken for shards still to do."""
    away = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    shutil.rmtree(away)


def join_shards(folder: str | Path, output: str, *, on_shard: Callable[[], None] | None = None) -> None:
    """Writes the shards of a folder into one .npy or .jsonl file, in order, a block at a time; the file appears whole.

    Args:
        folder: with its manifest and all its shards.
        output: a name that ends in .npy or .jsonl.
        on_shard: called after every shard.

    Raises:
        ValueError: no manifest, shards that are missing or damaged, or that differ in dimension.
    """
    folder = Path(folder)
    shards = Shards.of_manifest(folder, _read_manifest(folder))
    if missing := [s for s in range(shards.count) if not shards.is_whole(s)]:
        raise ValueError(f"folder: {folder} misses {named(missing)} of {shards.count} shards")
    axes: tuple[int, ...] | None = None
    with embedding_writer(output) as write:
        for s in range(shards.count):
            embeddings = np.load(shards.path(s), mmap_mode="r")
            axes = embeddings.shape[1:] if axes is None else axes
            if embeddings.shape[1:] != axes:
                shape = list(embeddings.shape[1:])
                raise ValueError(f"folder: {shards.path(s)} has embeddings of shape {shape}, shard 0 {list(axes)}")
            for start in range(0, max(1, len(embeddings)), BLOCK):  # an empty one still tells the dimension
                write(embeddings[start : start + BLOCK])
            if on_shard is not None:
                on_shard()


def named(numbers: Sequence[int], what: str = "shard") -> str:
    """`shard 3`, or `shards 3, 5, .. (70 in all)`."""
    some = ", ".join(map(str, numbers[:_MAX_NAMED]))
    more = f", .. ({len(numbers)} in all)" if len(numbers) > _MAX_NAMED else ""
    return f"{what}{'s' * (len(numbers) > 1)} {some}{more}"
