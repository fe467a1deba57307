"""Prompts to time: random token ids, padded on the left as the reference implementation pads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Left-padded prompts.

    Attributes:
        input_ids: [B, N] int64.
        attention_mask: [B, N] int64, 1 at real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.attention_mask.sum(dim=1).tolist()


def random_batch(vocab: int, lengths: Sequence[int], *, seed: int, device: str | torch.device) -> Batch:
    """Rows of the given lengths with ids drawn uniformly from the vocabulary; the same for the same seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(vocab, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(list(lengths))[:, None]).long()
    return Batch((ids * mask).to(device), mask.to(device))


def draw_lengths(rows: int, longest: int, *, mixed: bool, seed: int) -> list[int]:
    """Lengths in tokens: all `longest`, or log-normal with median `longest / 3` (clipped), one of them `longest`.

    The shape (sigma 0.7, the upper tenth at 0.8 of the longest) is that of the passages of retrieval corpora.
    """
    if not mixed:
        return [longest] * rows
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(math.log(longest / 3) + 0.7 * torch.randn(rows, generator=generator, dtype=torch.float64))
    lengths = drawn.round().clamp(1, longest).int().tolist()
    lengths[0] = longest
    return lengths


def check_lengths(longest: int) -> list[int]:
    """Four rows that agreement is checked on: two whole, one half and one a sixth as long, hence padded."""
    return [longest, longest, max(1, longest // 2), max(1, longest // 6)]
