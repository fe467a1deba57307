"""Queries, keys and values of a joint projection: norm and rotary embedding in place, keys and values to their slots.

A row of `qkv` holds H query heads, H_kv key heads and H_kv value heads of d columns. For a query or key head x of the
token at position p, in float32, rounded once::

    x = x / sqrt(mean(x^2) + eps) * (offset + w)             where the model norms queries and keys
    (a, b) = (a cos_p - b sin_p, b cos_p + a sin_p)          a, b: columns 0 to r/2 - 1 and r/2 to r - 1

Columns from r on are not rotated. Then keys[row, :, p] and values[row, :, p] become the token's key and value. Row and
position are each token's own, so one token of every row and packed prompts run on the same kernel.

Grid: (T, blocks of heads). A thread holds a column of a and the same column of b, and nobody else reads what it writes.
Traffic, s bytes per element: s T d (2 H + 5 H_kv) and r T 4 bytes of cosines and sines for each block of heads.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..launching import dependent
from ..plan import Config, cdiv
from .checks import check, check_first
from .dependent import wait_for_kernel_before

ELEMENTS = 512  # of a block of heads, in one half, at most


@triton.jit
def columns_of(p_heads, m_heads, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers and mask of `WIDTH` columns of each head, from `start` on."""
    column = tl.arange(0, BLOCK)
    return p_heads[:, None] + (start + column)[None, :], m_heads[:, None] & (column < WIDTH)[None, :]


@triton.jit
def norm_weight(q_norm_ptr, k_norm_ptr, is_query, start, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """offset + w, float32 [heads, BLOCK]."""
    column = tl.arange(0, BLOCK)
    m_column = column < WIDTH
    query = tl.load(q_norm_ptr + start + column, mask=m_column, other=0.0).to(tl.float32)
    key = tl.load(k_norm_ptr + start + column, mask=m_column, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], query[None, :], key[None, :]) + offset


# Packed indices of an odd number of tokens are not aligned, which is no reason to compile again.
@triton.jit(do_not_specialize_on_alignment=["position_ptr", "row_ptr"])
def rotary_write_kernel(
    qkv_ptr,  # [T, (H + 2 H_kv) d], in and out
    cos_ptr,  # [P, r / 2] float32; the same for sin
    sin_ptr,
    position_ptr,  # [T] int64; the same for row
    row_ptr,
    key_ptr,  # [R, H_kv, S, d], out
    value_ptr,  # [R, H_kv, S, d], out
    q_norm_ptr,  # [d]; None: queries and keys are not normed
    k_norm_ptr,  # [d]
    stride_qkv,
    stride_kr,
    stride_kh,
    stride_ks,
    stride_vr,
    stride_vh,
    stride_vs,
    eps,
    offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # d
    HALF: tl.constexpr,  # r / 2
    DEPENDENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: all columns are rotated
):
    REST: tl.constexpr = WIDTH - 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_query = head < HEADS
    rotated = head < HEADS + KV_HEADS
    is_key = rotated & (head >= HEADS)
    m_heads = head < HEADS + 2 * KV_HEADS

    wait_for_kernel_before(DEPENDENT)
    position = tl.load(position_ptr + token)
    row = tl.load(row_ptr + token)
    p_heads = qkv_ptr + token * stride_qkv + head * WIDTH
    p_a, m_a = columns_of(p_heads, m_heads, 0, HALF, BLOCK_HALF)
    p_b, m_b = columns_of(p_heads, m_heads, HALF, HALF, BLOCK_HALF)
    a = tl.load(p_a, mask=m_a, other=0.0)
    b = tl.load(p_b, mask=m_b, other=0.0)
    wide_a = a.to(tl.float32)
    wide_b = b.to(tl.float32)
    if REST > 0:
        p_rest, m_rest = columns_of(p_heads, m_heads, 2 * HALF, REST, BLOCK_REST)
        rest = tl.load(p_rest, mask=m_rest, other=0.0)
        wide_rest = rest.to(tl.float32)

    if q_norm_ptr is not None:
        square = tl.sum(wide_a * wide_a + wide_b * wide_b, 1)
        if REST > 0:
            square += tl.sum(wide_rest * wide_rest, 1)
        scale = tl.rsqrt(square / WIDTH + eps)[:, None]
        wide_a *= scale * norm_weight(q_norm_ptr, k_norm_ptr, is_query, 0, offset, HALF, BLOCK_HALF)
        wide_b *= scale * norm_weight(q_norm_ptr, k_norm_ptr, is_query, HALF, offset, HALF, BLOCK_HALF)
        if REST > 0:
            wide_rest *= scale * norm_weight(q_norm_ptr, k_norm_ptr, is_query, 2 * HALF, offset, REST, BLOCK_REST)

    column = tl.arange(0, BLOCK_HALF)
    m_column = column < HALF
    cos = tl.load(cos_ptr + position * HALF + column, mask=m_column, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + column, mask=m_column, other=0.0)[None, :]
    a = tl.where(rotated[:, None], (wide_a * cos - wide_b * sin).to(a.dtype), a)
    b = tl.where(rotated[:, None], (wide_b * cos + wide_a * sin).to(b.dtype), b)
    tl.store(p_a, a, mask=m_a & rotated[:, None])
    tl.store(p_b, b, mask=m_b & rotated[:, None])

    kv_head = (head - HEADS).to(tl.int64)
    p_key = key_ptr + row * stride_kr + kv_head * stride_kh + position * stride_ks
    p_value = value_ptr + row * stride_vr + (kv_head - KV_HEADS) * stride_vh + position * stride_vs
    p_slot = tl.where(is_key, p_key, p_value)
    m_slot = m_heads & (head >= HEADS)
    p_slot_a, m_slot_a = columns_of(p_slot, m_slot, 0, HALF, BLOCK_HALF)
    p_slot_b, m_slot_b = columns_of(p_slot, m_slot, HALF, HALF, BLOCK_HALF)
    tl.store(p_slot_a, a, mask=m_slot_a)
    tl.store(p_slot_b, b, mask=m_slot_b)
    if REST > 0:
        rest = tl.where(rotated[:, None], wide_rest.to(rest.dtype), rest)
        tl.store(p_rest, rest, mask=m_rest & rotated[:, None])
        p_slot_rest, m_slot_rest = columns_of(p_slot, m_slot, 2 * HALF, REST, BLOCK_REST)
        tl.store(p_slot_rest, rest, mask=m_slot_rest)


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
    """Norms and rotates query and key heads in place, and writes keys and values to their slots.

    Args:
        qkv: [T, (H + 2 H_kv) d] float16, bfloat16 or float32, the heads of queries, keys and values, in this order.
        cos, sin: [P, r / 2] float32, contiguous, a row for each position; r is at most d.
        position: [T] int64, contiguous, at least 0 and below both P and S: each token's position and its slot. Not
            checked, because it is never read on the host.
        row: [T] int64, contiguous, at least 0 and below R: each token's row in the buffers.
        keys, values: [R, H_kv, S, d] in the dtype of qkv, any strides but the last, which is 1.
        q_norm, k_norm: [d] of any float dtype, weights of a norm of each head before the rotation; both or neither.
        eps, offset: of these norms.

    Raises:
        TypeError, ValueError: a tensor does not fit.
    """
    tokens, columns = check_first("qkv", qkv)
    check("keys", keys, tuple(keys.shape) if keys.dim() == 4 else (None, None, None, None), qkv)
    check("values", values, tuple(keys.shape), qkv)
    _, kv_heads, _, width = keys.shape
    heads, left = divmod(columns, width)
    if left or heads <= 2 * kv_heads:
        raise ValueError(
            f"qkv: got {columns} columns, expected a multiple of {width} beyond the {2 * kv_heads} heads of keys "
            "and values"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check(name, table, (len(cos), cos.shape[-1]), qkv, torch.float32)
        if not table.is_contiguous() or not 2 <= 2 * table.shape[1] <= width:
            raise ValueError(f"{name}: got shape {list(table.shape)}, expected [P, 1 to {width // 2}], contiguous")
    for name, index in (("position", position), ("row", row)):
        check(name, index, (tokens,), qkv, torch.int64)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("k_norm: got one norm of queries and keys without the other, expected both or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check(name, norm, (width,), qkv, norm.dtype)
    config = head_config(width, cos.shape[1], heads, dependent(qkv.device))
    if tokens:
        launching.launch(
            rotary_write_kernel,
            (tokens, cdiv(heads, config.blocks["BLOCK_H"])),
            (
                qkv, cos, sin, position, row, keys, values, q_norm, k_norm,
                qkv.stride(0), *keys.stride()[:3], *values.stride()[:3], eps, offset,
            ),
            config,
            HEADS=heads - 2 * kv_heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            HALF=cos.shape[1],
            DEPENDENT=config.dependent,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def head_config(width: int, half: int, heads: int, dependent: bool) -> Config:
    """Blocks of heads, of which one may be enough, and columns. A thread has 8 columns of each half, 16 bytes in half
    precision."""
    block, rest = 1 << (half - 1).bit_length(), width - 2 * half
    block_heads = max(1, min(ELEMENTS // block, 1 << (heads - 1).bit_length()))
    blocks = {
        "BLOCK_H": block_heads,
        "BLOCK_HALF": block,
        "BLOCK_REST": 1 << (rest - 1).bit_length() if rest else 0,
    }
    return Config(blocks, max(1, block_heads * block // 256), 1, dependent=dependent)
