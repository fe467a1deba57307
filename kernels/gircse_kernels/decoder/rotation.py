"""Rotary embedding of heads into a new tensor, and its gradient, for training (`rotary.py` rotates in place).

For a head x of the token at a position with cosines and sines c, s, in float32, rounded once; a, b are columns 0 to
d/2 - 1 and d/2 to d - 1::

    (a, b) = (a c_a - b s_a, b c_b + a s_b)        backward: (a, b) = (a c_a + b s_b, b c_b - a s_a)

A program takes a block of heads of one token. Traffic, s bytes per element: 2 s B H N d, and the cosines and sines once
for each block of heads, from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..launching import DTYPES
from ..plan import cdiv
from .rotary import columns_of, head_config


@triton.jit
def rotate_kernel(
    x_ptr,  # [B, H, N, d]
    cos_ptr,  # [B or 1, N, d]; the same for sin
    sin_ptr,
    out_ptr,  # [B, H, N, d], out
    length,  # N
    stride_xb,
    stride_xh,
    stride_xn,
    stride_cb,
    stride_cn,
    stride_ob,
    stride_oh,
    stride_on,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: there are no other columns
):
    token = tl.program_id(0)
    row = (token // length).to(tl.int64)
    place = (token % length).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_heads = head < HEADS
    p_x = x_ptr + row * stride_xb + place * stride_xn + head.to(tl.int64) * stride_xh
    p_a, m_a = columns_of(p_x, m_heads, 0, HALF, BLOCK_HALF)
    p_b, m_b = columns_of(p_x, m_heads, HALF, HALF, BLOCK_HALF)
    a = tl.load(p_a, mask=m_a, other=0.0).to(tl.float32)
    b = tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)
    column = tl.arange(0, BLOCK_HALF)
    m_column = column < HALF
    o_table = row * stride_cb + place * stride_cn + column
    cos_a = tl.load(cos_ptr + o_table, mask=m_column, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + o_table + HALF, mask=m_column, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + o_table, mask=m_column, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + o_table + HALF, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        out_a = a * cos_a + b * sin_b
        out_b = b * cos_b - a * sin_a
    else:
        out_a = a * cos_a - b * sin_a
        out_b = b * cos_b + a * sin_b
    p_out = out_ptr + row * stride_ob + place * stride_on + head.to(tl.int64) * stride_oh
    p_a, m_a = columns_of(p_out, m_heads, 0, HALF, BLOCK_HALF)
    p_b, m_b = columns_of(p_out, m_heads, HALF, HALF, BLOCK_HALF)
    tl.store(p_a, out_a.to(out_ptr.dtype.element_ty), mask=m_a)
    tl.store(p_b, out_b.to(out_ptr.dtype.element_ty), mask=m_b)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """x with its heads rotated, [B, H, N, d]: contiguous, or with `backward` a view of a contiguous [B, N, H, d], which
    is how projections lie.

    Args:
        x: [B, H, N, d] float16, bfloat16 or float32, any strides but the last, which is 1; d is even.
        cos, sin: [B or 1, N, d] of any float dtype, with the same strides, of which the last is 1.
        backward: the transposed rotation, which turns the gradient of the result into that of x.

    Raises:
        TypeError, ValueError: a tensor does not fit.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected float16, bfloat16 or float32")
    if x.dim() != 4 or x.shape[-1] % 2 or x.stride(-1) != 1:
        raise ValueError(
            f"x: got shape {list(x.shape)}, strides {x.stride()}, expected [B, H, N, even d], side by side"
        )
    batch, heads, length, width = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((batch, length, width), (1, length, width)) or table.stride(-1) != 1:
            raise ValueError(f"{name}: got shape {list(table.shape)}, expected [{batch} or 1, {length}, {width}]")
        if table.device != x.device or table.stride() != cos.stride():
            raise ValueError(f"{name}: got {table.stride()} on {table.device}, expected {cos.stride()} on {x.device}")
    if backward:
        out = torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device).transpose(1, 2)
    else:
        out = torch.empty((batch, heads, length, width), dtype=x.dtype, device=x.device)
    if out.numel():
        config = head_config(width, width // 2, heads, False)
        launching.launch(
            rotate_kernel,
            (batch * length, cdiv(heads, config.blocks["BLOCK_H"])),
            (
                x, cos, sin, out, length, *x.stride()[:3],
                cos.stride(0) if len(cos) == batch else 0, cos.stride(1), *out.stride()[:3],
            ),
            config,
            HEADS=heads,
            HALF=width // 2,
            BACKWARD=backward,
        )  # fmt: skip
    return out
