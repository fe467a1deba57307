"""Embeddings of texts after several numbers of steps, on disk: each text is encoded once and read at every K."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gircse.integers import as_integer

if TYPE_CHECKING:
    from gircse.model import GIRCSE

_BUFFER = 2**26  # bytes of embeddings that are collected before they are written
_WINDOW = 2**28  # bytes of embeddings after all steps that `encode_steps` holds

Encode = Callable[[list[str]], Iterable[np.ndarray]]  # texts -> one float32 [K, D] for each text, in order


class StepStore:
    """One file of float32 rows for each of `steps`, and an index from text to row.

    A text that is asked for again (at another K, in a bootstrap sample, on the other side of a pair) is not encoded
    again. Memory holds 16 bytes and a dictionary entry for each text, and one buffer. The disk holds
    texts x steps x D x 4 bytes until `clear` or `close`. Files are written, not mapped, so that a full disk is an
    OSError.

    Args:
        steps: numbers of steps >= 1, or [0] alone.
        folder: where the temporary folder of the files is made.

    Raises:
        ValueError: `steps` is empty, or has 0 among others.
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

    def clear(self) -> None:
        """Forgets all texts and frees their disk space."""
        self._rows.clear()
        self._width = 0
        for path in self._folder.iterdir():
            path.unlink()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def embeddings(self, texts: Sequence[str], step: int, encode: Encode, *, key: str | None = None) -> np.ndarray:
        """float32 [n, D]: the texts' embeddings after `step` steps. Texts that are not in the store are encoded first.

        Where the texts lie one after the other in the file, the result is mapped from it and takes no memory of its
        own; it may be changed without changing the file. It stays valid after `clear` and `close`.

        Args:
            encode: gives [max(steps), D] for each text ([1, D] if `steps` is [0]).
            key: what else the embedding depends on (the instruction); under another key a text is another text.

        Raises:
            ValueError: `step` is not among `steps`, or `encode` gave another number of embeddings than texts.
        """
        if step not in self.steps:
            raise ValueError(f"step: got {step}, expected one of {self.steps}")
        names = [_digest(text, key) for text in texts]
        missing = {name: text for name, text in zip(names, texts, strict=True) if name not in self._rows}
        if missing:
            self._add(list(missing), encode(list(missing.values())))
        if not names:
            return np.empty((0, self._width), np.float32)
        file = np.memmap(self._path(step), np.float32, mode="c", shape=(len(self._rows), self._width))
        rows = [self._rows[name] for name in names]
        first, last = rows[0], rows[-1]
        return np.asarray(file[first : last + 1] if rows == list(range(first, last + 1)) else file[rows])

    def _add(self, names: list[bytes], vectors: Iterable[np.ndarray]) -> None:
        columns = [max(step, 1) - 1 for step in self.steps]
        start = 0
        for block in _blocks(iter(vectors)):
            part = np.stack([vector[columns] for vector in block], axis=1)  # [steps, texts, D]
            self._width = part.shape[2]
            for step, rows in zip(self.steps, part, strict=True):
                with self._path(step).open("r+b" if self._path(step).exists() else "wb") as file:
                    file.seek(4 * self._width * len(self._rows))  # over what a failure may have left half-written
                    file.write(np.ascontiguousarray(rows, np.float32).tobytes())
            for name in names[start : start + len(block)]:
                self._rows[name] = len(self._rows)
            start += len(block)
            self.encoded += len(block)
        if start != len(names):
            raise ValueError(f"encode: got {start} embeddings, expected {len(names)}, one for each text")

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.f32"


def encode_steps(
    model: GIRCSE,
    texts: list[str],
    num_steps: int,
    *,
    instruction: str | None,
    batch_size: int | None,
    max_length: int | None,
) -> Iterator[np.ndarray]:
    """The embeddings of each text after 1, .., `num_steps` steps, float32 [K, D] ([1, D] for K = 0), in order.

    Only so many texts are encoded ahead that their embeddings fit into `_WINDOW` bytes (64 texts at least).
    """
    row_bytes = 4 * max(num_steps, 1) * model.embedding_dimension
    return model.encode_stream(
        texts,
        instruction=instruction,
        num_steps=num_steps,
        batch_size=batch_size,
        max_length=max_length,
        return_steps=True,
        window=min(16384, max(64, _WINDOW // row_bytes)),
    )


def check_steps(steps: Sequence[int], *, least: int = 0) -> tuple[int, ...]:
    """The numbers of steps, ascending and each once.

    Raises:
        ValueError: there is none, one is below `least` or no integer, or 0 is among others (K = 0 is the state of the
            prompt and not a prefix of a rollout, so that one pass cannot give both).
    """
    numbers = [as_integer(k) for k in steps] if isinstance(steps, Sequence) else []
    valid = {k for k in numbers if k is not None and k >= least}
    if not valid or not valid.issuperset(numbers) or (0 in valid and len(valid) > 1):
        raise ValueError(f"steps: got {steps!r}, expected a list of integers >= 1{'' if least else ', or 0 alone'}")
    return tuple(sorted(valid))


def _blocks(vectors: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The vectors in lists of at most `_BUFFER` bytes, or of one vector that is larger."""
    for first in vectors:
        yield [first, *islice(vectors, max(0, _BUFFER // max(first.nbytes, 1) - 1))]


def _digest(text: str, key: str | None) -> bytes:
    prefix = b"-" if key is None else f"{len(key)} {key}".encode("utf-8", "surrogatepass")
    return blake2b(prefix + b"\0" + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
