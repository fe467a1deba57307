"""What a decode step reads and writes, in static buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeState:
    """What a step reads and writes, for R rows.

    Attributes:
        hidden: [R, D], the state of which the next soft token is made.
        position: [R] int64, the position of that token.
        step: [R] int64, the number of steps so far.
        states: [R, K_max, D], g_1..g_step.
    """

    hidden: Tensor
    position: Tensor
    step: Tensor
    states: Tensor

    @classmethod
    def allocate(cls, rows: int, num_steps: int, like: Tensor) -> DecodeState:
        """Zeros, with the dtype and device of `like` [.., D]."""
        width = like.shape[-1]
        return cls(
            like.new_zeros(rows, width),
            torch.zeros(rows, dtype=torch.long, device=like.device),
            torch.zeros(rows, dtype=torch.long, device=like.device),
            like.new_zeros(rows, num_steps, width),
        )

    def first(self, rows: int) -> DecodeState:
        """A view of the first rows."""
        return DecodeState(self.hidden[:rows], self.position[:rows], self.step[:rows], self.states[:rows])

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        for tensor in (self.hidden, self.position, self.states):
            tensor[target] = tensor[source]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.hidden, self.position, self.step, self.states))
