"""The shapes that micro-batches are padded to, so that few graphs serve all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS_OF_AN_OCTAVE = 8  # buckets between n and 2n, so that at most an eighth of the positions is added
_LENGTH_STEP = 16


class Bucket(NamedTuple):
    """What one pair of graphs is for. Shapes are static, and Python numbers of the capture stay in the graph."""

    rows: int
    length: int
    num_steps: int
    soft_token_gradient: float

    @classmethod
    def of(cls, shape: torch.Size, num_steps: int, soft_token_gradient: float, *, most_positions: int | None) -> Bucket:
        """The bucket of token ids [b, N], which has a few rows and tokens more."""
        rows, length = bucket_shape(*shape, num_steps=num_steps, most_positions=most_positions)
        return cls(rows, length, num_steps, float(soft_token_gradient))

    @property
    def positions(self) -> int:
        return self.rows * (self.length + self.num_steps)

    def pad(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Adds tokens of id 0 that do not count, and rows of one such token that does."""
        room = (0, self.length - input_ids.shape[1], 0, self.rows - len(input_ids))
        ids, mask = F.pad(input_ids, room), F.pad(attention_mask, room)
        mask[len(input_ids) :, 0] = 1
        return ids, mask


def bucket_shape(rows: int, length: int, *, num_steps: int, most_positions: int | None = None) -> tuple[int, int]:
    """Texts and tokens of the bucket of `rows` texts of `length` tokens, in a model that has `most_positions`."""
    padded = _rounded(length, _LENGTH_STEP)
    if most_positions is not None:
        padded = max(length, min(padded, most_positions - num_steps))
    return _rounded(rows), padded


def _rounded(count: int, least: int = 1) -> int:
    """`count` or a little more, a multiple of `least` and one of few numbers."""
    step = max(least, (1 << (count - 1).bit_length()) // (2 * _STEPS_OF_AN_OCTAVE))
    return -(-count // step) * step
