"""Tiled products: the device functions of a product's tile, and the two kernels that `info_nce` launches.

    product_kernel      out += A B       A [T, C] of a chunk of columns, B [V, D]
    vocab_grad_kernel   out = A^T B      A [T, C] of a chunk of columns, B [T, D], summed over blocks of rows

Every tile of a result belongs to one program, so there are no atomics and two runs are bitwise equal.
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


@triton.jit
def row_dot(
    a_ptr,  # [T, K], offset to nothing
    b_ptr,  # [V, K]
    rows,
    vocab,
    m_rows,
    m_vocab,
    width,
    stride_at,
    stride_ak,
    stride_bv,
    stride_bk,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a [rows] @ b [vocab]^T, float32 [BLOCK_T, BLOCK_V]; rows and vocab int64."""
    k = tl.arange(0, BLOCK_K)
    p_a = a_ptr + rows[:, None] * stride_at + k[None, :] * stride_ak
    p_b = b_ptr + vocab[:, None] * stride_bv + k[None, :] * stride_bk
    product = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, width, BLOCK_K):
        m_k = k < width - start
        a = tl.load(p_a, mask=m_rows[:, None] & m_k[None, :], other=0.0)
        b = tl.load(p_b, mask=m_vocab[:, None] & m_k[None, :], other=0.0)
        product = dot(a, tl.trans(b), product, PRECISION)
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_bk
    return product


@triton.jit(do_not_specialize=["chunk_start", "num_rows"])
def product_kernel(
    a_ptr,  # [T, C]
    b_ptr,  # [V, D]
    out_ptr,  # [splits, T, D] float32, in and out
    num_rows,
    width,
    stride_a,
    stride_bv,
    stride_bd,
    stride_out_split,
    chunk_start,
    chunk_size,
    per_split,  # columns of a, a multiple of BLOCK_V
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_rows, i_cols = grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tl.cdiv(width, BLOCK_E), GROUP)
    i_split = tl.program_id(1)
    rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    rows64 = rows.to(tl.int64)
    cols = i_cols * BLOCK_E + tl.arange(0, BLOCK_E)
    m_cols = cols < width
    inside = m_rows[:, None] & m_cols[None, :]
    p_out = out_ptr + i_split.to(tl.int64) * stride_out_split + rows64[:, None] * width + cols[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    inner = tl.arange(0, BLOCK_V)
    first = i_split * per_split
    for start in range(first, tl.minimum(first + per_split, chunk_size), BLOCK_V):
        column = start + inner
        m_column = column < chunk_size
        a = tl.load(
            a_ptr + rows64[:, None] * stride_a + column[None, :],
            mask=m_rows[:, None] & m_column[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + (chunk_start + column).to(tl.int64)[:, None] * stride_bv + cols.to(tl.int64)[None, :] * stride_bd,
            mask=m_column[:, None] & m_cols[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION)
    if not FIRST:
        acc += tl.load(p_out, mask=inside, other=0.0)
    tl.store(p_out, acc, mask=inside)


@triton.jit(do_not_specialize=["chunk_start", "num_rows"])
def vocab_grad_kernel(
    a_ptr,  # [T, C]: dS
    b_ptr,  # [T, D]: hidden
    a2_ptr,  # [T, C]: P, with DUAL
    b2_ptr,  # [T, D]: upstream gradient, with DUAL
    sum_ptr,  # [C, D] float32, in and out: where the rows come in several blocks
    out_ptr,  # [V, D] out, any dtype
    num_rows,
    width,
    stride_a,
    stride_bt,
    stride_bd,
    stride_b2t,
    stride_b2d,
    stride_out,
    chunk_start,
    chunk_size,
    FIRST: tl.constexpr,  # block of rows
    LAST: tl.constexpr,
    DUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_vocab, i_cols = grouped(tl.program_id(0), tl.cdiv(chunk_size, BLOCK_V), tl.cdiv(width, BLOCK_E), GROUP)
    column = i_vocab * BLOCK_V + tl.arange(0, BLOCK_V)
    m_column = column < chunk_size
    cols = i_cols * BLOCK_E + tl.arange(0, BLOCK_E)
    m_cols = cols < width
    cols64 = cols.to(tl.int64)
    inner = tl.arange(0, BLOCK_T)
    inside = m_column[:, None] & m_cols[None, :]
    acc = tl.zeros([BLOCK_V, BLOCK_E], tl.float32)
    for start in range(0, num_rows, BLOCK_T):
        rows = start + inner
        m_rows = rows < num_rows
        rows64 = rows.to(tl.int64)
        p_a = rows64[:, None] * stride_a + column[None, :]
        m_a = m_rows[:, None] & m_column[None, :]
        m_b = m_rows[:, None] & m_cols[None, :]
        a = tl.load(a_ptr + p_a, mask=m_a, other=0.0)
        b = tl.load(b_ptr + rows64[:, None] * stride_bt + cols64[None, :] * stride_bd, mask=m_b, other=0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION)
        if DUAL:
            a2 = tl.load(a2_ptr + p_a, mask=m_a, other=0.0)
            b2 = tl.load(b2_ptr + rows64[:, None] * stride_b2t + cols64[None, :] * stride_b2d, mask=m_b, other=0.0)
            acc = dot(tl.trans(a2), b2, acc, PRECISION)
    p_part = column.to(tl.int64)[:, None] * width + cols64[None, :]
    if not FIRST:
        acc += tl.load(sum_ptr + p_part, mask=inside, other=0.0)
    if LAST:
        vocab = (chunk_start + column).to(tl.int64)
        tl.store(out_ptr + vocab[:, None] * stride_out + cols64[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(sum_ptr + p_part, acc, mask=inside)
