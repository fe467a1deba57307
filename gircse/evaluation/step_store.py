"""Embeddings of texts after several numbers of steps, on disk: each text is encoded once and read at every K."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from numbers import Integral
from pathlib import Path

import numpy as np

_BUFFER = 2**26  # bytes of embeddings that are collected before they are written

Encode = Callable[[list[str]], Iterable[np.ndarray]]  # texts -> one float32 [K, D] a text, in order


class StepStore:
    """One file of float32 rows for each of `steps`; an index from prompt to row.

    Texts, not calls, are the unit: a text that a task asks for again (another K, a bootstrap sample, the other side of
    a pair) is not encoded again. Held in memory: 16 bytes and a dictionary entry a text, and one buffer. On disk:
    texts x steps x D x 4 bytes, until `clear` or `close`.

    Args:
        steps: numbers of steps >= 1, or [0] alone.
        folder: where to put the files (a temporary folder is made in it, and removed at the end).

    Raises:
        ValueError: `steps` is empty, or mixes 0 with others.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self.steps = check_steps(steps)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".steps-", dir=folder))
        self._rows: dict[bytes, int] = {}
        self._width = 0
        self.encoded = 0  # texts, over the whole life of the store

    def __enter__(self) -> StepStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def clear(self) -> None:
        """Forgets all texts and frees their disk space."""
        self._rows.clear()
        self._width = 0
        for path in self._folder.iterdir():
            path.unlink()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def embeddings(self, texts: Sequence[str], step: int, encode: Encode, *, key: str | None = None) -> np.ndarray:
        """float32 [n, D]: the texts' embeddings after `step` steps; texts not met before are encoded first.

        Args:
            encode: gives [max(steps), D] a text ([1, D] with steps [0]).
            key: what else the embedding depends on (the instruction); the same text under another key is another text.

        Raises:
            ValueError: `step` is not among `steps`.
        """
        if step not in self.steps:
            raise ValueError(f"step: got {step}, expected one of {self.steps}")
        names = [_digest(text, key) for text in texts]
        missing = {name: text for name, text in zip(names, texts, strict=True) if name not in self._rows}
        if missing:
            self._add(list(missing), encode(list(missing.values())))
        if not names:
            return np.empty((0, self._width), np.float32)
        rows = np.memmap(self._path(step), np.float32, mode="r", shape=(len(self._rows), self._width))
        return np.asarray(rows[[self._rows[name] for name in names]])

    def _add(self, names: list[bytes], vectors: Iterable[np.ndarray]) -> None:
        columns = [max(step, 1) - 1 for step in self.steps]
        start = 0
        for block in _blocks(iter(vectors)):
            part = np.stack([vector[columns] for vector in block], axis=1)  # [steps, texts, D]
            self._width = part.shape[2]
            for step, rows in zip(self.steps, part, strict=True):
                with self._path(step).open("r+b" if self._path(step).exists() else "wb") as file:
                    file.seek(4 * self._width * len(self._rows))  # over what a failure may have left half written
                    file.write(np.ascontiguousarray(rows, np.float32).tobytes())
            for name in names[start : start + len(block)]:
                self._rows[name] = len(self._rows)
            start += len(block)
            self.encoded += len(block)
        if start != len(names):
            raise ValueError(f"encode: gave {start} embeddings for {len(names)} texts")

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.f32"


def _blocks(vectors: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The vectors in lists of at most `_BUFFER` bytes (one vector at least)."""
    for first in vectors:
        yield [first, *islice(vectors, max(0, _BUFFER // max(first.nbytes, 1) - 1))]


def check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """The numbers of steps, sorted and each once.

    Raises:
        ValueError: none, or a negative one, or 0 among others (K = 0 is the prompt's own state, not a prefix).
    """
    whole = isinstance(steps, Sequence) and all(isinstance(k, Integral) and not isinstance(k, bool) for k in steps)
    if not whole or not steps or min(steps) < 0 or (0 in steps and len(set(steps)) > 1):
        raise ValueError(f"steps: got {steps!r}, expected a list of integers >= 1, or 0 alone")
    return tuple(sorted(set(steps)))


def _digest(text: str, key: str | None) -> bytes:
    prefix = b"-" if key is None else f"{len(key)} {key}".encode("utf-8", "surrogatepass")
    return blake2b(prefix + b"\0" + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
