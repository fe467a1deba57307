"""Tiled products of float32 matrices in three TF32 products each (3xTF32): the accuracy of float32 on tensor cores.

For `launching.product` where PyTorch's settings would let cuBLAS round float32 to TF32. Every tile of a result belongs
to one program, so there are no atomics and two runs are bitwise equal.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION "widen": the interpreter multiplies no bfloat16, so it gets float32."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grouped(program, blocks_0, blocks_1, GROUP: tl.constexpr):
    """Tile coordinates in an order in which GROUP blocks of the first dimension share what they read in L2."""
    per_group = GROUP * blocks_1
    group = program // per_group
    size = tl.minimum(blocks_0 - group * GROUP, GROUP)
    inside = program % per_group
    return group * GROUP + inside % size, inside // size


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def product_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    out_ptr,  # [M, N] any dtype, out; with ADD in and out
    num_rows,  # M
    num_cols,  # N
    num_inner,  # K
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_om,
    stride_on,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_rows, i_cols = grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N), GROUP)
    rows = i_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = i_cols * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = (rows < num_rows)[:, None]
    m_cols = (cols < num_cols)[None, :]
    rows = rows.to(tl.int64)[:, None]
    cols = cols.to(tl.int64)[None, :]
    inner = tl.arange(0, BLOCK_K)
    p_a = a_ptr + rows * stride_am + inner.to(tl.int64)[None, :] * stride_ak
    p_b = b_ptr + inner.to(tl.int64)[:, None] * stride_bk + cols * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        m_inner = inner < num_inner - start
        a = tl.load(p_a, mask=m_rows & m_inner[None, :], other=0.0)
        b = tl.load(p_b, mask=m_inner[:, None] & m_cols, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_bk
    p_out = out_ptr + rows * stride_om + cols * stride_on
    if ADD:
        acc += tl.load(p_out, mask=m_rows & m_cols, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_rows & m_cols)
