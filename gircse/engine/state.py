"""What a decode step reads and writes, in static buffers."""

from __future__ import annotations

from dataclasses import dataclass, fields

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
        embedding: [R, D] float32 (or 64), z_K after the last Jacobi pass.
        moved: [R] float32 (or 64), 1 - cosine of it and the one before.
    """

    hidden: Tensor
    position: Tensor
    step: Tensor
    states: Tensor
    embedding: Tensor
    moved: Tensor

    @classmethod
    def allocate(cls, rows: int, num_steps: int, like: Tensor) -> DecodeState:
        """Zeros, with the dtype and device of `like` [.., D]."""
        width, wide = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
        return cls(
            like.new_zeros(rows, width),
            torch.zeros(rows, dtype=torch.long, device=like.device),
            torch.zeros(rows, dtype=torch.long, device=like.device),
            like.new_zeros(rows, num_steps, width),
            like.new_zeros(rows, width, dtype=wide),
            like.new_zeros(rows, dtype=wide),
        )

    def first(self, rows: int) -> DecodeState:
        """A view of the first rows."""
        return DecodeState(*(tensor[:rows] for tensor in self._tensors))

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        for tensor in (self.hidden, self.position, self.states, self.embedding):
            tensor[target] = tensor[source]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]
