"""Decoding: one token of every row, on the static buffers of the pool.

k and v are written to slot position[r], then row r attends to slots <= position[r] (and > position[r] - window).
Positions are read on the device.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from gircse.engine.pool import KVPool, PoolPass
from gircse.ops.backends import refusal


class DecodePass(PoolPass):
    """One token of every row. The same object serves every step; call `begin` before each.

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.
        position: [rows] int64 on the device, the position of each row's token; it is only read.
        kernel: "sdpa", "flash" or "triton" (see `decode_kernel`).

    Attributes:
        positions, start: `position`.
        row: [rows] int64, 0, 1, ..
    """

    def __init__(self, pool: KVPool, rows: int, slots: int, position: Tensor, kernel: str) -> None:
        super().__init__(pool, rows, slots)
        self.positions = self.start = position
        self.kernel = kernel
        self.row = torch.arange(rows, device=position.device)
        self._slot = torch.arange(slots, device=position.device)
        self._length: Tensor | None = None
        self._bias: dict[int | None, Tensor] = {}
        self._arrivals: Tensor | None = None  # of the triton kernel: zeros between any two layers

    def begin(self) -> None:
        """Discards what was computed from the positions of the step before."""
        self._bias.clear()
        self._length = None

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        query, key, value = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        keys, values = self.buffers(layer, key.shape[1], (key.shape[2], value.shape[2]), key)
        keys[self.row, :, self.positions] = key
        values[self.row, :, self.positions] = value
        out = self.attention(layer, query, key, value, scaling=scaling, window=window, softcap=softcap)
        return out[:, :, None]

    def attention(self, layer, query, key, value, *, scaling, window, softcap):
        keys, values = self.pool.layer(layer, self.rows, self.slots)
        if window is not None and window >= self.slots:
            window = None
        if self.kernel == "flash":
            return _flash_decode(query, keys, values, self._lengths(), scaling, window, softcap)
        if self.kernel == "triton":
            from gircse_kernels.decoder.attention import WIDEST, decode_attention

            if max(query.shape[-1], values.shape[-1]) <= WIDEST:
                if self._arrivals is None or len(self._arrivals) < self.rows * query.shape[1]:
                    self._arrivals = torch.zeros(self.rows * query.shape[1], dtype=torch.int32, device=query.device)
                return decode_attention(
                    query,
                    keys,
                    values,
                    self.positions,
                    scale=scaling,
                    window=window,
                    softcap=softcap,
                    arrivals=self._arrivals,
                )
        # The query heads of one key head become queries of that head, so that keys and values are not repeated.
        batch, heads, head_dim = query.shape
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
        return out.reshape(batch, heads, values.shape[-1])

    def _lengths(self) -> Tensor:
        """[rows] int32, the slots that each row sees without a window. Made once per step."""
        if self._length is None:
            self._length = (self.positions + 1).to(torch.int32)
        return self._length

    def _bias_of(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, slots]: 0 where a row may attend, else -inf. Made once per step and window, for all layers."""
        bias = self._bias.get(window)
        if bias is None:
            distance = self.positions[:, None] - self._slot
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
    """The attention kernel of a decode step for a value of `EngineConfig.decode_attention`.

    Raises:
        ValueError: the choice cannot run on this device, in this dtype or without the package it needs.
    """
    if choice == "flash":
        half = dtype in (torch.float16, torch.bfloat16)
        if device.type != "cuda" or not half or not has_flash_attention():
            raise ValueError(
                f"decode_attention: got 'flash' with {dtype} on {device.type}, expected float16 or bfloat16 on CUDA "
                "and the package flash-attn (pip install flash-attn)"
            )
        return "flash"
    if choice == "triton" or (choice == "auto" and device.type == "cuda"):
        reason = refusal(device, dtype)
        if reason is None:
            return "triton"
        if choice == "triton":
            raise ValueError(f"decode_attention: got 'triton', expected what its kernel takes: {reason}")
    return "sdpa"


def _flash_decode(query, keys, values, length, scaling, window, softcap):
    from flash_attn import flash_attn_with_kvcache

    out = flash_attn_with_kvcache(
        query[:, None],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cache_seqlens=length,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[:, 0]
