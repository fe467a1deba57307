"""Prefill: the tokens of several texts, packed; their keys and values go to the pool.

Projections, norms and MLPs see no padding, and only the attention itself pads (texts of a prefill are about equally
long). The decoder's own body brings q, k, v as [1, H | H_kv, T, d] (`attend`), ours as [T, H | H_kv, d] after it has
written k and v to their slots (`attention`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gircse.engine.pool import KVPool
from gircse.lm.attention import AttentionPass, causal_attention, causal_band


class PrefillPass(AttentionPass):
    """Several texts, packed into one row of tokens.

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.
        start: the first text's row; the others follow.
        texts: token ids of each text without the prefix, longest first.
        prefix: keys and values of the tokens before each text (`RolloutKV.prompt` of one row), or None.
        device: of the model.

    Attributes:
        ids: [T] int64, the packed tokens.
        positions: [T] int64, position of each packed token.
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
    ) -> None:
        self.pool, self.rows, self.slots, self.prefix = pool, rows, slots, prefix
        lengths = [len(text) for text in texts]
        self.batch = slice(start, start + len(lengths))
        self.before = 0 if prefix is None else next(iter(prefix.values()))[0].shape[2]
        self.longest = lengths[0]
        self.uniform = lengths[-1] == lengths[0]
        # The indices are computed on the host and copied once, so that nothing waits for the device.
        count = torch.tensor(lengths)
        self._text = torch.repeat_interleave(torch.arange(len(lengths)), count)
        first = count.cumsum(0) - count
        inside = torch.arange(int(count.sum())) - first[self._text]
        gather = (first[:, None] + torch.arange(self.longest)).clamp_max(len(inside) - 1)
        self.ids = torch.tensor([token for text in texts for token in text]).to(device)
        self.positions = (inside + self.before).to(device)
        self.last = (first + count - 1).to(device)
        self.row = (self._text + start).to(device)
        self._text, self._inside, self._gather = self._text.to(device), inside.to(device), gather.to(device)
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        keys, values = self.buffers(layer, key.shape[1], (key.shape[2], value.shape[2]), key)
        for buffer, new in ((keys, key), (values, value)):
            if self.uniform:  # without padding, views replace the gathers
                buffer[self.batch, :, self.before : self.before + self.longest] = self._unpack(new)
            else:
                buffer[self.row, :, self.positions] = new
        out = self.attention(layer, query, key, value, scaling=scaling, window=window, softcap=softcap)
        return out[None].transpose(1, 2)

    def buffers(self, layer: int, heads: int, dims: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """`KVPool.buffers`: keys [rows, H_kv, slots, d] and values [rows, H_kv, slots, d_v]."""
        return self.pool.buffers(layer, self.rows, self.slots, heads, dims, like)

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Queries [T, H, d], keys [T, H_kv, d] and values [T, H_kv, d_v], which are in the buffers too,
        -> [T, H, d_v]."""
        keys, values = self.pool.layer(layer, self.rows, self.slots)
        end = self.before + self.longest
        if self.prefix is not None:
            prefix_key, prefix_value = self.prefix[layer]
            keys[self.batch, :, : self.before] = prefix_key
            values[self.batch, :, : self.before] = prefix_value
        out = causal_attention(
            self._unpack(query) if self.uniform else query[self._gather].transpose(1, 2),
            keys[self.batch, :, :end],
            values[self.batch, :, :end],
            mask=self._mask(window, query.device),
            scaling=scaling,
            softcap=softcap,
        )
        out = out.transpose(1, 2)  # [n, longest, H, d_v]
        return out.flatten(0, 1) if self.uniform else out[self._text, self._inside]

    def _unpack(self, packed: Tensor) -> Tensor:
        """[n * longest, H, d] -> [n, H, longest, d]."""
        return packed.unflatten(0, (-1, self.longest)).transpose(1, 2)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """None where plain causality is enough, else [1, 1, longest, before + longest]. One mask serves all rows:
        the slots beyond a text's end are later than each of its tokens."""
        if window is not None and window >= self.before + self.longest:
            window = None
        if window is None and not self.before:
            return None
        if window not in self._masks:
            self._masks[window] = causal_band(self.longest, self.before, window=window, device=device)
        return self._masks[window]
