"""Embeddings after every number of steps, in one pass over the hidden states: prefix sum, then L2 norm.

    acc_k = sum_{i <= k} w_i g_i;  z_k = acc_k / |acc_k|

The mean's 1 / k and the weighted mean's 1 / sum(w) cancel in the norm. One program holds one row's accumulator in
registers and walks its steps: [B, K, D] is read once, [K, B, D] written once, in bfloat16 parts. A large batch is taken
some steps at a time, `first` to `last - 1`: the forward sums the earlier steps again, the backward takes its sum up
where the later ones left it (so it must begin with the last). Backward is the reverse walk::

    d acc_k = (d z_k - z_k (z_k . d z_k)) / |acc_k|;  d g_i = w_i sum_{k >= i} d acc_k

A zero vector stays zero, and so does its gradient.
"""

import triton
import triton.language as tl

from .parts import load_parts, store_parts


@triton.jit
def step_weight(k, WEIGHTED: tl.constexpr):
    """w_i: i (counted from 1) for the weighted mean, else 1."""
    if WEIGHTED:
        return (k + 1).to(tl.float32)
    return 1.0


@triton.jit(do_not_specialize=["num_rows", "first", "last"])
def pool_kernel(
    steps_ptr,  # [B, K, D]
    out_ptr,  # [last - first, B, PARTS, D] bfloat16, out
    norm_ptr,  # [last - first, B] float32, out
    num_rows,
    first,
    last,
    width,
    stride_b,
    stride_k,
    stride_d,
    smallest,  # a shorter vector counts as zero
    LAST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_d = d < width
    acc = tl.zeros([BLOCK_D], tl.float32)
    for k in range(0, last):
        index = tl.zeros([BLOCK_D], tl.int64) + k
        step = tl.load(steps_ptr + row * stride_b + index * stride_k + d.to(tl.int64) * stride_d, mask=m_d, other=0.0)
        if LAST:
            acc = step.to(tl.float32)
        else:
            acc += step.to(tl.float32) * step_weight(tl.cast(k, tl.int32), WEIGHTED)
        if k >= first:
            norm = tl.sqrt(tl.sum(acc * acc, 0))
            scale = tl.where(norm > smallest, 1.0 / tl.maximum(norm, smallest), 0.0)
            place = out_ptr + ((index - first) * num_rows + row) * PARTS * width + d
            store_parts(place, width, acc * scale, m_d, PARTS)
            tl.store(norm_ptr + tl.cast(k - first, tl.int64) * num_rows + row, norm)


@triton.jit(do_not_specialize=["num_rows", "num_steps", "first", "last"])
def pool_grad_kernel(
    grad_ptr,  # [last - first, B, D] float32, gradient of the embeddings
    out_ptr,  # [last - first, B, PARTS, D] bfloat16, the embeddings
    norm_ptr,  # [last - first, B] float32
    carry_ptr,  # [B, D] float32, in and out, with BUFFERED: sum of d acc over the later steps
    steps_grad_ptr,  # [B, K, D] the steps' dtype, out; it holds that sum itself where that is float32
    num_rows,
    num_steps,
    first,
    last,
    width,
    smallest,
    CARRIED: tl.constexpr,  # there are later steps
    BUFFERED: tl.constexpr,
    LAST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_d = d < width
    acc = tl.zeros([BLOCK_D], tl.float32)
    if CARRIED:
        if BUFFERED:
            acc = tl.load(carry_ptr + row * width + d, mask=m_d, other=0.0)
        else:
            after = tl.load(steps_grad_ptr + (row * num_steps + last) * width + d, mask=m_d, other=0.0)
            acc = after.to(tl.float32) / step_weight(tl.cast(last, tl.int32), WEIGHTED)
    for reverse in range(0, last - first):
        k = last - 1 - reverse
        index = tl.zeros([BLOCK_D], tl.int64) + k
        offset = ((index - first) * num_rows + row) * width + d
        grad = tl.load(grad_ptr + offset, mask=m_d, other=0.0)
        place = out_ptr + ((index - first) * num_rows + row) * PARTS * width + d
        unit = load_parts(place, width, m_d, PARTS)
        norm = tl.load(norm_ptr + tl.cast(k - first, tl.int64) * num_rows + row)
        scale = tl.where(norm > smallest, 1.0 / tl.maximum(norm, smallest), 0.0)
        inner = (grad - unit * tl.sum(grad * unit, 0)) * scale
        if LAST:
            acc = inner
        else:
            acc += inner
        weighted = acc * step_weight(tl.cast(k, tl.int32), WEIGHTED)
        tl.store(
            steps_grad_ptr + (row * num_steps + index) * width + d,
            weighted.to(steps_grad_ptr.dtype.element_ty),
            mask=m_d,
        )
    if BUFFERED:
        tl.store(carry_ptr + row * width + d, acc, mask=m_d)
