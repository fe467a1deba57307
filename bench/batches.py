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


def random_batch(
    vocab: int, lengths: Sequence[int], *, seed: int, device: str | torch.device, shared_prefix: int = 0
) -> Batch:
    """Rows of the given lengths with ids drawn uniformly from the vocabulary; the same for the same seed everywhere.

    All rows start with the same `shared_prefix` tokens.

    Raises:
        ValueError: a row that would have no token of its own.
    """
    if shared_prefix >= min(lengths):
        raise ValueError(f"shared_prefix: got {shared_prefix}, expected less than the shortest row's {min(lengths)}")
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(vocab, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(list(lengths))[:, None]).long()
    common = ids[0, longest - lengths[0] :][:shared_prefix].clone()
    for row, length in enumerate(lengths):
        ids[row, longest - length :][:shared_prefix] = common
    return Batch((ids * mask).to(device), mask.to(device))


FIXED, LOGNORMAL, UNIFORM = DISTRIBUTIONS = ("fixed", "lognormal", "uniform")


def draw_lengths(rows: int, longest: int, *, distribution: str, seed: int) -> list[int]:
    """Lengths in tokens: all `longest`, or drawn from 1 to `longest` and one of them `longest`.

    "lognormal" has the median `longest / 3`; its shape (sigma 0.7, the upper tenth at 0.8 of the longest) is that of
    the passages of retrieval corpora. "uniform" spreads evenly, which makes the most padding.
    """
    if distribution == FIXED:
        return [longest] * rows
    generator = torch.Generator().manual_seed(seed)
    if distribution == UNIFORM:
        lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    else:
        drawn = torch.exp(math.log(longest / 3) + 0.7 * torch.randn(rows, generator=generator, dtype=torch.float64))
        lengths = drawn.round().clamp(1, longest).int().tolist()
    lengths[0] = longest
    return lengths


def check_lengths(longest: int) -> list[int]:
    """Four rows that agreement is checked on: two whole, one half and one a sixth as long, hence padded."""
    return [longest, longest, max(1, longest // 2), max(1, longest // 6)]


def spaced(rows: int, most: int) -> list[int]:
    """Indices of at most so many rows, the first and the last among them."""
    if rows <= most:
        return list(range(rows))
    return [round(i * (rows - 1) / (most - 1)) for i in range(most)]
