"""How far every step moves an embedding, and after which step a text has settled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gircse.inspect.failures import SETTLED


@dataclass
class Movement:
    """Running sums of 1 - cos(z_k, z_{k-1}) for k = 2..K, so that no text's steps are kept.

    Attributes:
        settled: for each text the step at which it settled, see `settled_at`.
    """

    num_steps: int
    settled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = np.zeros(self.num_steps - 1)
        self.squares = np.zeros_like(self.sums)

    def watch(self, stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes normalised embeddings [K, D] on, one for each text, and adds their movement."""
        for embeddings in stream:
            moved = np.clip(1 - np.einsum("kd,kd->k", embeddings[1:], embeddings[:-1], dtype=np.float64), 0, None)
            self.sums += moved
            self.squares += moved**2
            self.settled.append(settled_at(moved))
            yield embeddings

    def summary(self) -> dict[str, Any]:
        """Mean and standard deviation for each step; the share of texts that settled, and the median of their K (None
        if less than half settled)."""
        count = max(len(self.settled), 1)
        mean = self.sums / count
        spread = np.sqrt(np.clip(self.squares / count - mean**2, 0, None))
        stopped = sorted(k for k in self.settled if k)
        half = (len(self.settled) - 1) // 2
        return {
            "steps": list(range(2, self.num_steps + 1)),
            "mean": mean.tolist(),
            "std": spread.tolist(),
            "settled": {
                "threshold": SETTLED,
                "share": len(stopped) / count,
                "median": stopped[half] if half < len(stopped) else None,
            },
        }


def settled_at(moved: np.ndarray) -> int:
    """The K at which `encode(num_steps="auto")` would stop: the second of two steps in a row that move less than
    `SETTLED`, or 0 if there are no such two.

    Args:
        moved: [K - 1] 1 - cos(z_k, z_{k-1}) for k = 2..K.
    """
    small = moved < SETTLED
    both = np.flatnonzero(small[1:] & small[:-1])
    return int(both[0]) + 3 if len(both) else 0
