"""Keys and values of a decode batch in static buffers, and the attention of prefill and decoding on them.

Slot j of row r holds position j of text r. One flat tensor per layer and kind; a batch of R rows with S slots sees its
first R * H_kv * S * d elements as [R, H_kv, S, d], so one allocation serves every bucket. Buffers are zeroed once: what
an earlier batch left behind is masked, but a masked NaN would still spread, so it must stay finite.

    prefill   q, k, v [1, H | H_kv, T, d]   the tokens of several texts, packed; projections, norms and MLPs see no
                                            padding, only the attention itself pads (texts of a prefill are about
                                            equally long); k and v go to their slots
    decode    q, k, v [R, H | H_kv, 1, d]   k and v go to slot position[r], then row r looks at slots <= position[r]
                                            (and > position[r] - window); positions are read on the device
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gircse.lm.attention import AttentionPass, RolloutKV, causal_attention, causal_band

_ALIGNMENT = 64  # bytes, of PyTorch's own CPU tensors
_MAX_VIEWS = 4096  # kept to be made only once; batches of every size would make millions


class KVPool:
    """The buffers of all layers, allocated when a layer is first written to.

    Args:
        tokens: slots over all rows.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._flat: dict[int, tuple[Tensor, Tensor]] = {}
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._shapes: dict[int, tuple[int, int, int]] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._flat.values() for tensor in pair)

    def zero_(self) -> None:
        """Wipes numbers that are not finite (a model overflowed) before another batch meets them."""
        for pair in self._flat.values():
            for tensor in pair:
                tensor.zero_()

    def allocate(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Buffers for a layer whose keys and values [.., H_kv, n, d] look like these, unless it has them."""
        if layer not in self._flat:
            self._shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
            self._flat[layer] = (
                _zeros(self.tokens * key.shape[1] * key.shape[3], key),
                _zeros(self.tokens * value.shape[1] * value.shape[3], value),
            )

    def layer(self, layer: int, rows: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys [rows, H_kv, slots, d] and values [rows, H_kv, slots, d_v] of a layer that was written to."""
        found = self._views.get((layer, rows, slots))
        if found is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            (key, value), (heads, dim_k, dim_v) = self._flat[layer], self._shapes[layer]
            found = self._views[layer, rows, slots] = (
                key[: rows * heads * slots * dim_k].view(rows, heads, slots, dim_k),
                value[: rows * heads * slots * dim_v].view(rows, heads, slots, dim_v),
            )
        return found

    def move_rows(self, source: Tensor, target: Tensor, rows: int, slots: int) -> None:
        """Copies rows `source` [m] onto rows `target` [m] in every layer."""
        for layer in self._flat:
            for buffer in self.layer(layer, rows, slots):
                buffer[target] = buffer[source]


def _zeros(count: int, like: Tensor) -> Tensor:
    """[count] zeros; on a CPU they take memory only where they are written to (calloc)."""
    if like.device.type != "cpu":
        return like.new_zeros(count)
    raw = torch.from_numpy(np.zeros(count * like.itemsize + _ALIGNMENT, dtype=np.uint8))
    offset = -raw.data_ptr() % _ALIGNMENT
    return raw[offset : offset + count * like.itemsize].view(like.dtype)


class Prefix:
    """Keys and values of the tokens that all rows start with.

    Args:
        length: number of these tokens.
        kv: a `RolloutKV` that holds one row with them.
    """

    def __init__(self, length: int, kv: RolloutKV) -> None:
        self.length = length
        self.kv = kv.prompt

    def __len__(self) -> int:
        return self.length


class PrefillPass(AttentionPass):
    """Several texts, packed into one row of tokens.

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.
        start: the first text's row; the others follow.
        lengths: tokens of each text without the prefix, longest first.
        prefix: what stands before each of them, or None.
        device: of the model.

    Attributes:
        positions: [1, T] int64, position of each packed token.
        last: [n] int64, index among the packed tokens of each text's last.
    """

    def __init__(
        self,
        pool: KVPool,
        rows: int,
        slots: int,
        start: int,
        lengths: Sequence[int],
        prefix: Prefix | None,
        device: torch.device,
    ) -> None:
        self.pool, self.rows, self.slots, self.prefix = pool, rows, slots, prefix
        self.batch = slice(start, start + len(lengths))
        self.before, self.longest = len(prefix) if prefix is not None else 0, lengths[0]
        self.uniform = lengths[-1] == lengths[0]
        # index arithmetic on the host, one copy each: nothing waits for the device
        count = torch.tensor(lengths)
        self._text = torch.repeat_interleave(torch.arange(len(lengths)), count)
        first = count.cumsum(0) - count
        inside = torch.arange(int(count.sum())) - first[self._text]
        gather = (first[:, None] + torch.arange(self.longest)).clamp_max(len(inside) - 1)
        self.positions = (inside + self.before)[None].to(device)
        self.last = (first + count - 1).to(device)
        self._row = (self._text + start).to(device)
        self._text, self._inside, self._gather = self._text.to(device), inside.to(device), gather.to(device)
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        self.pool.allocate(layer, key, value)
        keys, values = self.pool.layer(layer, self.rows, self.slots)
        end = self.before + self.longest
        if self.prefix is not None:
            prefix_key, prefix_value = self.prefix.kv[layer]
            keys[self.batch, :, : self.before] = prefix_key
            values[self.batch, :, : self.before] = prefix_value
        if self.uniform:  # the packed row is the padded batch: views instead of gathers
            query = self._unpack(query)
            keys[self.batch, :, self.before : end] = self._unpack(key)
            values[self.batch, :, self.before : end] = self._unpack(value)
        else:
            query = query[0][:, self._gather].transpose(0, 1)
            keys[self._row, :, self.positions[0]] = key[0].transpose(0, 1)
            values[self._row, :, self.positions[0]] = value[0].transpose(0, 1)
        out = causal_attention(
            query,
            keys[self.batch, :, :end],
            values[self.batch, :, :end],
            mask=self._mask(window, query.device),
            scaling=scaling,
            softcap=softcap,
        )
        out = out.transpose(1, 2)  # [n, longest, H, d]
        out = out.flatten(0, 1) if self.uniform else out[self._text, self._inside]
        return out[None].transpose(1, 2)

    def _unpack(self, packed: Tensor) -> Tensor:
        """[1, H, n * longest, d] -> [n, H, longest, d]."""
        return packed[0].unflatten(1, (-1, self.longest)).transpose(0, 1)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Causality alone where that says it; else [1, 1, longest, before + longest]. What lies beyond a text's end is
        later than each of its tokens, so rows need no masks of their own."""
        if window is not None and window >= self.before + self.longest:
            window = None
        if window is None and not self.before:
            return None
        if window not in self._masks:
            self._masks[window] = causal_band(self.longest, self.before, window=window, device=device)
        return self._masks[window]


class DecodePass(AttentionPass):
    """One token of every row. The same object serves every step: call `begin` before each.

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.
        position: [rows] int64 on the device, where each row's token stands; read, never changed.
        kernel: "sdpa", "flash" or "triton" (see `decode_kernel`).
    """

    def __init__(self, pool: KVPool, rows: int, slots: int, position: Tensor, kernel: str) -> None:
        self.pool, self.rows, self.slots, self.position, self.kernel = pool, rows, slots, position, kernel
        self._row = torch.arange(rows, device=position.device)
        self._slot = torch.arange(slots, device=position.device)
        self._length = position.to(torch.int32)
        self._bias: dict[int | None, Tensor] = {}

    def begin(self) -> None:
        """Positions have moved on: what was computed from them for the step before is void."""
        self._bias.clear()
        self._length = self.position.to(torch.int32)

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        keys, values = self.pool.layer(layer, self.rows, self.slots)
        if self.kernel == "flash":
            return _flash_decode(query, key, value, keys, values, self._length, scaling, window, softcap)
        keys[self._row, :, self.position] = key[:, :, 0]
        values[self._row, :, self.position] = value[:, :, 0]
        if window is not None and window >= self.slots:
            window = None
        if self.kernel == "triton":
            from gircse_kernels.decode_attention import decode_attention

            out = decode_attention(
                query[:, :, 0], keys, values, self.position, scale=scaling, window=window, softcap=softcap
            )
            return out[:, :, None]
        # the query heads of one key head as that head's queries: keys and values are read once, never repeated
        batch, heads, _, head_dim = query.shape
        query = query.reshape(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        bias = self._bias_of(window, query.dtype)
        if softcap is None and query.device.type != "cpu":
            out = torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=bias.expand(-1, -1, query.shape[2], -1), scale=scaling
            )
        else:  # on a CPU three plain steps take two thirds of SDPA's time on one query
            scores = (query * scaling) @ keys.transpose(-1, -2)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            wide = torch.promote_types(scores.dtype, torch.float32)
            out = (scores + bias).softmax(-1, dtype=wide).to(query.dtype) @ values
        return out.reshape(batch, heads, 1, values.shape[-1])

    def _bias_of(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, slots]: 0 where a row may look, else -inf. Once per step and window, not per layer."""
        bias = self._bias.get(window)
        if bias is None:
            distance = self.position[:, None] - self._slot
            hidden = distance < 0
            if window is not None:
                hidden = hidden | (distance >= window)
            bias = torch.zeros_like(distance, dtype=dtype).masked_fill(hidden, float("-inf"))[:, None, None]
            self._bias[window] = bias
        return bias


@cache
def has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def decode_kernel(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which attention a decode step runs on for `EngineConfig.decode_attention`.

    Raises:
        ValueError: the choice cannot run on this device, in this dtype or without the package it needs.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if choice == "flash" or (choice == "auto" and device.type == "cuda" and half and has_flash_attention()):
        if device.type != "cuda" or not half or not has_flash_attention():
            raise ValueError(
                f"decode_attention: got 'flash' with {dtype} on {device.type}, expected float16 or bfloat16 on CUDA "
                "and the package flash-attn (pip install flash-attn)"
            )
        return "flash"
    if choice == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("decode_attention: got 'triton', expected the package triton to be installed")
        return "triton"
    return "sdpa"


def _flash_decode(query, key, value, keys, values, length, scaling, window, softcap):
    """Writes the new entries and attends, in one kernel of flash-attn."""
    from flash_attn import flash_attn_with_kvcache

    out = flash_attn_with_kvcache(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        k=key.transpose(1, 2),
        v=value.transpose(1, 2),
        cache_seqlens=length,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out.transpose(1, 2)
