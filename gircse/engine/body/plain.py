"""The elementwise steps of a decoder layer in plain PyTorch: the definition, and what runs where no kernel does.

`gircse_kernels` has a kernel of the same name and arguments for each. T tokens, width D, heads of size d, H query and
H_kv key heads. All compute in float32 (float64 for float64) and round once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last dimension, in float32 (float64)."""
    x, weight = _wide(x), _wide(weight)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight if offset else weight)


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    offset: float,
    delta_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds the output of a block to the residual stream, in place, and normalises the sum for the next block.

    Args:
        x: [T, D], the residual stream; becomes ``x + delta``, or ``x + rms_norm(delta, delta_weight)``.
        delta: [T, D]; None: nothing is added.
        weight: [D], of the norm. It scales by ``offset + weight``; the offset is 1 in Gemma and 0 elsewhere.
        delta_weight: [D], of a norm of the block's output (Gemma 2 and 3), with the same eps and offset.
        out: [T, D], for the result; None: a new tensor.

    Returns:
        [T, D] in the dtype of x, ``rms_norm(x, weight)``.
    """
    if delta is not None:
        x += delta if delta_weight is None else rms_norm(delta, delta_weight, eps, offset).to(x.dtype)
    normed = rms_norm(x, weight, eps, offset).to(x.dtype)
    return normed if out is None else out.copy_(normed)


def finish_step(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    states: Tensor,
    position: Tensor,
    step: Tensor,
    *,
    eps: float,
    offset: float,
    delta_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The end of a decode step: `add_rms_norm`, whose result is also kept, and the counters of every row.

    Args:
        states: [R, K_max, D]; ``states[r, step[r]]`` becomes the hidden state of row r.
        position, step: [R] int64; both go up by 1.
        x, delta, weight, eps, offset, delta_weight, out: as for `add_rms_norm`, of R tokens.

    Returns:
        [R, D], the hidden states.
    """
    hidden = add_rms_norm(x, delta, weight, eps=eps, offset=offset, delta_weight=delta_weight, out=out)
    states[torch.arange(len(step), device=step.device), step] = hidden
    position += 1
    step += 1
    return hidden


def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    row: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> None:
    """Normalises (Qwen3, Gemma 3) and rotates query and key heads in place, and writes keys and values to their slots.

    Dimension i < r/2 is rotated with dimension i + r/2, as in transformers' Llama; those from r on stay as they are.

    Args:
        qkv: [T, (H + 2 H_kv) d], the heads of queries, keys and values, in this order.
        cos, sin: [P, r/2] of each position, in float32 (float64 for float64).
        position: [T] int64, the position of each token and its slot.
        row: [T] int64, the row of each token in the buffers.
        keys, values: [R, H_kv, S, d]; ``keys[row, :, position]`` becomes the token's key.
        q_norm, k_norm: [d], weights of `rms_norm` over a head.
    """
    kv_heads, size = keys.shape[1], keys.shape[3]
    heads = qkv.view(len(qkv), -1, size)
    query, key, value = heads.tensor_split((heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads), dim=1)
    cos, sin = cos[position][:, None], sin[position][:, None]
    half = cos.shape[-1]
    for part, weight in ((query, q_norm), (key, k_norm)):
        wide = _wide(part) if weight is None else rms_norm(part, weight, eps, offset)
        first, second = wide[..., :half], wide[..., half : 2 * half]
        rotated = (first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :])
        part.copy_(torch.cat(rotated, dim=-1))
    keys[row, :, position] = key
    values[row, :, position] = value


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``: [T, 2 I], gate then up, -> [T, I]. `activation`: a key of `ACTIVATIONS`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (ACTIVATIONS[activation](_wide(gate)) * up).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
