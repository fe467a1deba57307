"""Embeddings after chosen numbers of steps, of any number of texts, in a file; and how far every step moved them.

A hundred steps of a hundred thousand texts do not fit memory. One pass gives all prefixes of a text; the chosen ones
go into a memory-mapped file, the movement of every step into running counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.inspect.failures import SETTLED

if TYPE_CHECKING:
    from gircse.model import GIRCSE

_WINDOW_BYTES = 512 << 20  # embeddings of all steps of a window; two are held at once


@dataclass
class Movement:
    """Running counts of 1 - cos(z_k, z_{k-1}), k = 2..K, and of where texts settle."""

    num_steps: int
    count: int = 0
    settled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = np.zeros(max(self.num_steps - 1, 0))
        self.squares = np.zeros_like(self.sums)

    def add(self, embeddings: np.ndarray) -> None:
        """[K, D] normalised embeddings of one text."""
        moved = np.clip(1 - np.einsum("kd,kd->k", embeddings[1:], embeddings[:-1], dtype=np.float64), 0, None)
        self.count += 1
        self.sums += moved
        self.squares += moved**2
        self.settled.append(settled_at(moved))

    def summary(self) -> dict[str, Any]:
        """Per step mean and standard deviation; where texts settle: median K, share that had by the last step."""
        mean = self.sums / max(self.count, 1)
        spread = np.sqrt(np.clip(self.squares / max(self.count, 1) - mean**2, 0, None))
        stopped = sorted(k for k in self.settled if k)
        half = (len(self.settled) - 1) // 2
        return {
            "steps": list(range(2, self.num_steps + 1)),
            "mean": mean.tolist(),
            "std": spread.tolist(),
            "settled": {
                "threshold": SETTLED,
                "share": len(stopped) / max(self.count, 1),
                "median": stopped[half] if half < len(stopped) else None,
            },
        }


def settled_at(moved: np.ndarray) -> int:
    """The K at which `encode(num_steps="auto")` would stop: the second of two steps in a row below `SETTLED`; 0: none.

    Args:
        moved: 1 - cos(z_k, z_{k-1}) for k = 2..K.
    """
    small = moved < SETTLED
    both = np.flatnonzero(small[1:] & small[:-1])
    return int(both[0]) + 3 if len(both) else 0


@dataclass(frozen=True)
class EncodedSteps:
    """Embeddings of n texts after each of `steps` steps: float32 [len(steps), n, D] in a memory-mapped file."""

    steps: tuple[int, ...]
    embeddings: np.ndarray
    movement: Movement

    @classmethod
    def of(
        cls,
        model: GIRCSE,
        texts: Sequence[str],
        steps: tuple[int, ...],
        path: Path,
        *,
        instruction: str | None,
        batch_size: int | None,
        max_length: int | None,
    ) -> EncodedSteps:
        """Encodes the texts once, with steps[-1] steps.

        Args:
            steps: ascending numbers of steps >= 1, or (0,).
            path: of the file, which is made.
        """
        last, dim = steps[-1], model.embedding_dimension
        kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(steps), len(texts), dim))
        _reserve(path)
        movement = Movement(last)
        rows = [max(k, 1) - 1 for k in steps]
        stream = model.encode_stream(
            texts,
            instruction=instruction,
            num_steps=last,
            batch_size=batch_size,
            max_length=max_length,
            return_steps=True,
            window=max(1, min(len(texts), _WINDOW_BYTES // (4 * dim * max(last, 1)))),
        )
        for i, embeddings in enumerate(stream):
            kept[:, i] = embeddings[rows]
            movement.add(embeddings)
        return cls(steps, kept, movement)

    def at(self, k: int) -> np.ndarray:
        """[n, D] after k steps, normalised."""
        return self.embeddings[self.steps.index(k)]


def _reserve(path: Path) -> None:
    """The file's place on the disk. Without it, a full disk is noticed in the mapped memory: by a SIGBUS."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
