"""Attention of packed texts to the slots of a pool in one launch, without padding: flash-attention as PyTorch ships it.

`torch.nn.attention.varlen.varlen_attn` calls the same operator, but starts a second kernel for a state that only
dropout needs, and in torch 2.11 it does not pass on `seqused_k`, without which keys must be packed too.
"""

from __future__ import annotations

import math
import warnings
from functools import cache

import torch
from torch import Tensor

from gircse.lm.attention import causal_attention, causal_band
from gircse.ops.probe import relative_error, tolerance_of


def usable(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> bool:
    """Whether `varlen_attention` can compute attention of queries [T, H, d] to buffers [R, H_kv, S, d]."""
    heads, size = keys.shape[1], query.shape[2]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and size == values.shape[3]
        and size % 8 == 0
        and size <= 256
        and keys.numel() // size < 2**31  # the operator counts tokens in 32 bits
        and _is_right(query.device, query.dtype, query.shape[1] // heads, size)
    )


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    key_starts: Tensor,
    used: Tensor,
    longest: int,
    longest_key: int,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Causal grouped-query attention of n texts. The last query of a text sees the last of its slots.

    Args:
        query: [T, H, d], the queries of all texts, packed; any strides but the last.
        keys, values: [R, H_kv, S, d], contiguous. Slot j of row r is token ``r * H_kv * S + j`` of the operator.
        starts: [n + 1] int32, where each text's queries begin, and the end.
        key_starts: [n + 1] int32, the token at which each text's row begins; the last number is not used.
        used: [n] int32, the number of slots of each text.
        longest, longest_key: at least the queries and the slots of the longest text.
        window: a query sees so many slots, its own among them; None: all before it.

    Returns:
        [T, H, d].
    """
    return torch.ops.aten._flash_attention_forward(
        query,
        _tokens(keys),
        _tokens(values),
        starts,
        key_starts,
        longest,
        longest_key,
        0.0,  # dropout
        window is None,
        False,  # no debug mask
        scale=scaling,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
        seqused_k=used,
    )[0]


def _tokens(buffer: Tensor) -> Tensor:
    """[R, H_kv, S, d] as [tokens, H_kv, d]. Only every H_kv-th stretch of S tokens begins a row."""
    rows, heads, slots, size = buffer.shape
    return buffer.as_strided(((rows * heads - heads + 1) * slots, heads, size), (size, slots * size, 1))


@cache
def _is_right(device: torch.device, dtype: torch.dtype, groups: int, size: int) -> bool:
    """Compares the operator with plain attention, once: PyTorch does not document its arguments, and a wrong mask would
    give wrong embeddings."""
    try:
        error = max(_error(device, dtype, groups, size, window) for window in (None, 4))
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    else:
        if error <= tolerance_of(dtype):
            return True
        reason = f"it differs from plain attention by {error:.1e}"
    warnings.warn(f"prefill pads the texts of a batch, because flash-attention cannot be used: {reason}", stacklevel=2)
    return False


@torch.inference_mode()
def _error(device: torch.device, dtype: torch.dtype, groups: int, size: int, window: int | None) -> float:
    """The largest relative error of texts of 200, 9 and 1 tokens behind 3 others, in rows 1, 2 and 3."""
    heads, slots, before, lengths = 2, 208, 3, (200, 9, 1)
    shapes = (4, heads, slots, size), (4, heads, slots, size), (sum(lengths), groups * heads, size)
    counts = [math.prod(shape) for shape in shapes]
    noise = torch.arange(sum(counts), dtype=torch.float64).mul(1.7).sin().to(device, dtype).split(counts)
    keys, values, query = (part.view(shape) for part, shape in zip(noise, shapes, strict=True))
    texts, expected = query.split(lengths), []
    for row, text in enumerate(texts, 1):
        count = len(text)
        out = causal_attention(
            text.transpose(0, 1)[None].double(),
            keys[row : row + 1, :, : before + count].double(),
            values[row : row + 1, :, : before + count].double(),
            mask=causal_band(count, before, window=window, device=device),
            scaling=size**-0.5,
        )
        expected.append(out[0].transpose(0, 1))
    found = varlen_attention(
        query,
        keys,
        values,
        starts=torch.tensor([0, 200, 209, 210], dtype=torch.int32, device=device),
        key_starts=torch.arange(1, 5, dtype=torch.int32, device=device) * (heads * slots),
        used=torch.tensor([before + count for count in lengths], dtype=torch.int32, device=device),
        longest=max(lengths),
        longest_key=before + max(lengths),
        scaling=size**-0.5,
        window=window,
    )
    return max(map(relative_error, found.split(lengths), expected))
