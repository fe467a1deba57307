"""Prefill: the tokens of several texts, packed; their keys and values go to the pool.

No layer sees padding. Attention reads keys and values from the pool (`varlen`); where that kernel cannot run, the
attention alone pads (texts of a prefill are about equally long). The decoder's own body brings q, k, v as
[1, H | H_kv, T, d] (`attend`), ours as [T, H | H_kv, d] after it has written k and v to their slots (`attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gircse.engine import varlen
from gircse.engine.pool import KVPool, PoolPass
from gircse.lm.attention import causal_attention, causal_band

MOST_SPARE = 512  # tokens that a captured prefill may have too many


class PrefillPass(PoolPass):
    """Several texts, packed into one row of tokens.

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.
        start: the first text's row; the others follow.
        texts: token ids of each text without the prefix, longest first.
        prefix: keys and values [1, H_kv, P, d] of the tokens before each text, for each layer, or None.
        device: of the model.
        room: (n, T), for a pass that a CUDA graph contains: `refill` gives it other texts, fewer than n and of T tokens
            at most, without a prefix. The tokens that are missing, fewer than `MOST_SPARE`, make one more text. They
            are at the last slot of row 0, which no query reads before its own step has written it. None: n and T are
            those of the texts.

    Attributes:
        ids: [T] int64, the packed tokens.
        positions: [T] int64, position of each.
        row: [T] int64, its row in the buffers.
        last: [n] int64, index among the packed tokens of each text's last.
    """

    def __init__(
        self,
        pool: KVPool,
        rows: int,
        slots: int,
        start: int,
        texts: Sequence[Sequence[int]],
        prefix: dict[int, tuple[Tensor, Tensor]] | None,
        device: torch.device,
        *,
        room: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(pool, rows, slots)
        self.prefix, self._room = prefix, room
        self.before = 0 if prefix is None else next(iter(prefix.values()))[0].shape[2]
        arrays = self._arrays(start, texts)
        self._flat = _flat(arrays, device).to(device, non_blocking=True)
        self.ids, self.positions, self.row, self.last, self._starts, self._used, self._row_starts = _views(
            self._flat, arrays
        )
        self._key_starts: dict[int, Tensor] = {}
        self._masks: dict[int | None, Tensor | None] = {}
        self._padding: tuple[Tensor, ...] | None = None

    def refill(self, start: int, texts: Sequence[Sequence[int]]) -> None:
        """Puts other texts in the place of those that a pass with `room` has."""
        self._flat.copy_(_flat(self._arrays(start, texts), self._flat.device), non_blocking=True)
        for heads, starts in self._key_starts.items():
            torch.mul(self._row_starts, heads, out=starts)

    def _arrays(self, start: int, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The indices on the host: int64 ones, then int32 ones."""
        self.batch = slice(start, start + len(texts))
        self.longest = len(texts[0])
        self.uniform = len(texts[-1]) == self.longest
        count = np.fromiter(map(len, texts), np.int64, len(texts))
        ends = count.cumsum()
        total = int(ends[-1])
        ids = np.fromiter(chain.from_iterable(texts), np.int64, total)
        self._text = np.repeat(np.arange(len(texts)), count)
        self._inside = np.arange(total) - np.repeat(ends - count, count)
        positions, row, last, starts = self._inside + self.before, self._text + start, ends - 1, np.append(0, ends)
        used, row_starts = count + self.before, np.append(np.arange(start, start + len(texts)) * self.slots, 0)
        if self._room is not None:
            most_texts, most_tokens = self._room
            missing, texts_missing = most_tokens - total, most_texts - len(texts)
            assert missing >= 0 < texts_missing
            ids, positions, row = (
                np.pad(array, (0, missing), constant_values=value)
                for array, value in ((ids, ids[-1]), (positions, self.slots - 1), (row, 0))
            )
            last, row_starts = (np.pad(array, (0, texts_missing)) for array in (last, row_starts))
            starts = np.pad(starts, (0, texts_missing), constant_values=most_tokens)
            used = np.pad(np.append(used, min(missing, self.slots)), (0, texts_missing - 1))
            # No text is longer than a row. The kernel starts programs for so many tokens of each of the n texts.
            self.longest, self.uniform = min(most_tokens, max(self.slots, MOST_SPARE)), False
        return [ids, positions, row, last, *(array.astype(np.int32) for array in (starts, used, row_starts))]

    def write(self, buffer: Tensor, new: Tensor) -> None:
        if self.uniform:  # views replace the indices
            buffer[self.batch, :, self.before : self.before + self.longest] = self._unpack(new)
        else:
            super().write(buffer, new)

    def attention(self, layer, query, key, value, *, scaling, window, softcap):
        keys, values = self.pool.layer(layer, self.rows, self.slots)
        if self.prefix is not None:
            prefix_key, prefix_value = self.prefix[layer]
            keys[self.batch, :, : self.before] = prefix_key
            values[self.batch, :, : self.before] = prefix_value
        longest_key = self.before + self.longest if self._room is None else self.slots
        if window is not None and window >= longest_key:
            window = None
        if not varlen.usable(query, keys, values, softcap):
            return self._padded(query, keys, values, scaling=scaling, window=window, softcap=softcap)
        heads = keys.shape[1]
        if heads not in self._key_starts:
            self._key_starts[heads] = self._row_starts * heads
        return varlen.varlen_attention(
            query,
            keys,
            values,
            starts=self._starts,
            key_starts=self._key_starts[heads],
            used=self._used,
            longest=self.longest,
            longest_key=longest_key,
            scaling=scaling,
            window=window,
        )

    def _padded(self, query: Tensor, keys: Tensor, values: Tensor, *, window: int | None, **options) -> Tensor:
        """`attention` with queries padded to the longest text."""
        if self._room is not None:
            raise NotImplementedError("attention that pads has shapes that depend on the texts")
        end, mask = self.before + self.longest, self._mask(window, query.device)
        keys, values = keys[self.batch, :, :end], values[self.batch, :, :end]
        if self.uniform:
            out = causal_attention(self._unpack(query), keys, values, mask=mask, **options)
            return out.transpose(1, 2).flatten(0, 1)
        if self._padding is None:
            self._padding = self._padding_indices(query.device)
        gather, text, inside = self._padding
        out = causal_attention(query[gather].transpose(1, 2), keys, values, mask=mask, **options)
        return out.transpose(1, 2)[text, inside]

    def _padding_indices(self, device: torch.device) -> tuple[Tensor, ...]:
        """[n, longest] of the packed tokens, for every text to the length of the longest, and back: [T] twice, the text
        of each token and its place there. Made in the first layer that pads."""
        total = len(self._inside)
        first = np.flatnonzero(self._inside == 0)
        gather = (first[:, None] + np.arange(self.longest)).clip(max=total - 1)
        arrays = [gather.ravel(), self._text, self._inside]
        flat, text, inside = _views(_flat(arrays, device).to(device, non_blocking=True), arrays)
        return flat.view(gather.shape), text, inside

    def _unpack(self, packed: Tensor) -> Tensor:
        """[n * longest, H, d] -> [n, H, longest, d]."""
        return packed.unflatten(0, (-1, self.longest)).transpose(1, 2)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """None where plain causality is enough, else [1, 1, longest, before + longest]. One mask serves all rows:
        the slots beyond a text's end are later than each of its tokens."""
        if window is None and not self.before:
            return None
        if window not in self._masks:
            self._masks[window] = causal_band(self.longest, self.before, window=window, device=device)
        return self._masks[window]


def _flat(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The bytes of all arrays on the host, for one copy to the device that the host does not wait for."""
    size = sum(array.nbytes for array in arrays)
    flat = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.concatenate([array.view(np.uint8) for array in arrays], out=flat.numpy())
    return flat


def _views(flat: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The arrays in a copy of `_flat`. int64 ones come before int32 ones, so that each is aligned."""
    parts = flat.split([array.nbytes for array in arrays])
    dtypes = [torch.int64 if array.itemsize == 8 else torch.int32 for array in arrays]
    return [part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
