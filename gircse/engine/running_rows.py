"""The rows of a decode batch that have not settled. Those that have leave it, and the rest move together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gircse.engine.pool import KVPool
from gircse.engine.state import DecodeState


class RunningRows:
    """Texts 0 to `count` - 1 of a batch, in the first rows of the buffers.

    Args:
        count: number of texts.
        num_steps: K, the number of states of each.
        pool, state, slots: the buffers of the batch.
        buffer_rows: the rows of the buffers that a number of texts runs in.

    Attributes:
        state: the view of the rows that are still in use.
        texts: the text in each of its rows; -1 for one that has settled.
    """

    def __init__(
        self,
        count: int,
        num_steps: int,
        pool: KVPool,
        state: DecodeState,
        slots: int,
        buffer_rows: Callable[[int], int],
    ) -> None:
        self.state, self.texts = state, list(range(count))
        self._pool, self._slots, self._buffer_rows = pool, slots, buffer_rows
        self._states = state.states.new_zeros(count, num_steps, state.states.shape[-1])
        self._counts = torch.full((count,), num_steps)

    def leave(self, rows: Sequence[int], taken: int) -> bool:
        """Keeps the first `taken` states of these rows, whose texts have settled, and moves the others together where
        that makes the buffers smaller. Rows that have no text any more are passed over. -> whether any text is left."""
        rows = [row for row in rows if self.texts[row] >= 0]
        if rows:
            texts = [self.texts[row] for row in rows]
            source, target = torch.tensor([rows, texts], device=self._states.device)
            self._states[target, :taken] = self.state.states[source, :taken]
            self._counts[texts] = taken
        for row in rows:
            self.texts[row] = -1
        left = sum(text >= 0 for text in self.texts)
        if left and self._buffer_rows(left) < len(self.state.hidden):
            self._compact(left)
        return left > 0

    def result(self) -> tuple[Tensor, Tensor]:
        """The states [n, K, D] of all texts, and how many count of each [n]. What is still running has all K."""
        self.leave(range(len(self.texts)), self._states.shape[1])
        return self._states, self._counts

    def _compact(self, left: int) -> None:
        """Moves running rows from the tail into the rows of settled ones."""
        holes = [row for row in range(left) if self.texts[row] < 0]
        tail = [row for row in range(left, len(self.texts)) if self.texts[row] >= 0]
        if holes:
            device = self.state.hidden.device
            source, target = torch.tensor(tail, device=device), torch.tensor(holes, device=device)
            self._pool.move_rows(source, target, len(self.state.hidden), self._slots)
            self.state.move_rows(source, target)
        for row, other in zip(holes, tail, strict=True):
            self.texts[row] = self.texts[other]
        self.texts = self.texts[:left]
        self.state = self.state.first(self._buffer_rows(left))
        self.state.position[left:] = 0  # otherwise spare rows run beyond their slots
