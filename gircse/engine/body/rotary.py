"""Tables of the rotary values of every position, made by the stock module once instead of in every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gircse.engine.body.facts import UnknownDecoderError, takes_type


class RotaryTables:
    """Cosines and sines [P, r/2] of the positions below P.

    They are in float32 (float64 for float64): kernels round once, after the rotation. Tables are kept, because a
    captured graph goes on reading them; P is a power of two, so all together are at most twice the largest.

    Args:
        module: the stock decoder's `rotary_emb`.
        like: a weight of the model.
        positions: a module may choose other frequencies for positions from this one on; None: it does not.
    """

    def __init__(self, module: nn.Module, like: Tensor, positions: int | None) -> None:
        self._module: Any = module
        self._like = torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self._limit, self._typed = positions, takes_type(module)
        self._tables: dict[tuple[str | None, int], tuple[Tensor, Tensor]] = {}

    def of(self, kind: str | None, slots: int) -> tuple[Tensor, Tensor]:
        """Tables for at least `slots` positions, of a type of layer."""
        key = (kind if self._typed else None, 1 << (slots - 1).bit_length())
        if key not in self._tables:
            self._tables[key] = self._make(*key)
        return self._tables[key]

    @torch.no_grad()
    def _make(self, kind: str | None, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(count, device=self._like.device)[None]
        if self._limit is not None:  # no text gets further
            positions = positions.clamp_max(self._limit - 1)
        cos, sin = (table[0] for table in self._module(self._like, positions, *([kind] if self._typed else [])))
        half = cos.shape[-1] // 2
        if not (torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:])):
            raise UnknownDecoderError("its rotary values are not those of pairs (i, i + r/2)")
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()
