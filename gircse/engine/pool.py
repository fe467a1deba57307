"""Keys and values of a decode batch in static buffers.

Slot j of row r holds position j of text r. Each layer has one flat tensor for keys and one for values. A batch of R
rows with S slots views the first R * H_kv * S * d elements as [R, H_kv, S, d], so one allocation serves every bucket.
The buffers are zeroed once. Values from an earlier batch are masked, but a masked NaN would still spread, so all of
them must stay finite.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gircse.lm.attention import AttentionPass

_ALIGNMENT = 64  # bytes, of PyTorch's own CPU tensors
_MAX_VIEWS = 4096  # views are kept to be made once; over all sizes of batches there would be millions


class KVPool:
    """The buffers of all layers. A layer's are allocated when it is first written to.

    Args:
        tokens: slots over all rows.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._flat: dict[int, tuple[Tensor, Tensor]] = {}
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._shapes: dict[int, tuple[int, int, int]] = {}

    def tensors(self) -> list[Tensor]:
        """The flat tensors of all layers."""
        return [tensor for pair in self._flat.values() for tensor in pair]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def prefix(self, tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values [1, H_kv, tokens, d] of each layer, in a pool of one row."""
        return {layer: self.layer(layer, 1, tokens) for layer in self._flat}

    def zero_(self) -> None:
        """Removes numbers that are not finite, from a model that overflowed, before another batch uses the buffers."""
        for tensor in self.tensors():
            tensor.zero_()

    def buffers(
        self, layer: int, rows: int, slots: int, heads: int, dims: tuple[int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`layer`, after buffers in the dtype of `like` were allocated where the layer has none.

        Args:
            heads: H_kv.
            dims: d of keys, d of values.
        """
        if layer not in self._flat:
            self._shapes[layer] = (heads, *dims)
            key, value = (_zeros(self.tokens * heads * size, like) for size in dims)
            self._flat[layer] = (key, value)
        return self.layer(layer, rows, slots)

    def layer(self, layer: int, rows: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys [rows, H_kv, slots, d] and values [rows, H_kv, slots, d_v] of a layer that was written to."""
        views = self._views.get((layer, rows, slots))
        if views is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            (key, value), (heads, dim_k, dim_v) = self._flat[layer], self._shapes[layer]
            views = self._views[layer, rows, slots] = (
                key[: rows * heads * slots * dim_k].view(rows, heads, slots, dim_k),
                value[: rows * heads * slots * dim_v].view(rows, heads, slots, dim_v),
            )
        return views

    def move_rows(self, source: Tensor, target: Tensor, rows: int, slots: int) -> None:
        """Copies rows `source` [m] onto rows `target` [m] in every layer."""
        for layer in self._flat:
            for buffer in self.layer(layer, rows, slots):
                buffer[target] = buffer[source]


class PoolPass(AttentionPass):
    """A pass whose keys and values are in a pool. The stock body calls `attend`; ours takes `buffers`, writes keys and
    values of each token to [row, :, position], and calls `attention`. `attend` takes the tokens of all rows packed:
    q, k, v are [1, H | H_kv, T, d].

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.

    Attributes:
        positions: [T] int64, position of each token.
        row: [T] int64, its row in the buffers.
    """

    positions: Tensor
    row: Tensor

    def __init__(self, pool: KVPool, rows: int, slots: int) -> None:
        self.pool, self.rows, self.slots = pool, rows, slots

    def buffers(self, layer: int, heads: int, dims: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """`KVPool.buffers`: keys [rows, H_kv, slots, d] and values [rows, H_kv, slots, d_v]."""
        return self.pool.buffers(layer, self.rows, self.slots, heads, dims, like)

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        keys, values = self.buffers(layer, key.shape[1], (key.shape[2], value.shape[2]), key)
        self.write(keys, key)
        self.write(values, value)
        out = self.attention(layer, query, key, value, scaling=scaling, window=window, softcap=softcap)
        return out[None].transpose(1, 2)

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Keys or values [T, H_kv, d] to their slots of the buffer [rows, H_kv, slots, d]."""
        buffer[self.row, :, self.positions] = new

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
        """Queries [T, H, d], keys [T, H_kv, d] and values [T, H_kv, d_v], which are in the buffers already,
        -> [T, H, d_v]."""
        raise NotImplementedError


def _zeros(count: int, like: Tensor) -> Tensor:
    """[count] zeros. On a CPU they take memory only where they are written to (calloc)."""
    if like.device.type != "cpu":
        return like.new_zeros(count)
    raw = torch.from_numpy(np.zeros(count * like.itemsize + _ALIGNMENT, dtype=np.uint8))
    offset = -raw.data_ptr() % _ALIGNMENT
    return raw[offset : offset + count * like.itemsize].view(like.dtype)
