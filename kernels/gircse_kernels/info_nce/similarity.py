"""Tiles of similarities of unit vectors, all steps side by side, and their softmax over the candidates.

`similarity_kernel` computes a tile of logits x . y / temperature in float32 accuracy (3xTF32) and, either the tile's
softmax sums (forward)::

    peak = max s,  total = sum e^(s - peak)            over the candidates that count
    positive = s at the target,  hardest = max s over the counted ones that are not the target

or (backward, with the whole row's peak and total known) the tile of the gradient of the logits::

    G = weight_k (e^(s - peak) / total - [target])

of which a chunk [K, B, C] exists at a time; `matmul.product_kernel` turns it into the gradients of both sides. A tile
belongs to one program and every result to one owner: no atomics.
"""

import triton
import triton.language as tl

from ..matmul import grouped, row_dot
from ..scores import LOWEST


@triton.jit(do_not_specialize=["chunk_start", "num_rows"])
def similarity_kernel(
    x_ptr,  # [K, B, D] float32
    y_ptr,  # [K, M, D] float32
    target_ptr,  # [B] int64, the candidate that is each row's positive; negative: not among these candidates
    exclude_ptr,  # [B] int64, a candidate that does not count for its row; negative: none
    mask_ptr,  # [B, M] int8, 1: does not count
    peak_ptr,  # [K, B] float32, with GRADIENT
    total_ptr,  # [K, B] float32, with GRADIENT
    weight_ptr,  # [K] float32, with GRADIENT
    grad_ptr,  # [K, B, C] float32, out, with GRADIENT
    sums_ptr,  # [4, K, tiles, B] float32, out: peak, total, positive, hardest
    num_rows,
    num_columns,
    width,
    num_steps,
    chunk_start,
    chunk_size,
    stride_mask,
    scale,  # 1 / temperature
    HAS_EXCLUDE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(chunk_size, BLOCK_V)
    i_rows, i_tile = grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tiles, GROUP)
    step = tl.program_id(1)
    rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    rows64 = rows.to(tl.int64)
    column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_column = column < chunk_size
    candidate = (chunk_start + column).to(tl.int64)
    step64 = step.to(tl.int64)
    product = row_dot(
        x_ptr + step64 * num_rows * width, y_ptr + step64 * num_columns * width, rows64, candidate, m_rows, m_column,
        width, width, 1, width, 1, PRECISION, BLOCK_T, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    score = product * scale
    target = tl.load(target_ptr + rows, mask=m_rows, other=-1)
    is_target = candidate[None, :] == target[:, None]
    counts = m_column[None, :] & m_rows[:, None]
    if HAS_EXCLUDE:
        exclude = tl.load(exclude_ptr + rows, mask=m_rows, other=-1)
        counts = counts & (candidate[None, :] != exclude[:, None])
    if HAS_MASK:
        masked = tl.load(mask_ptr + rows64[:, None] * stride_mask + candidate[None, :], mask=counts, other=1)
        counts = counts & (masked == 0)
    if GRADIENT:
        slot = step64 * num_rows + rows64
        peak = tl.load(peak_ptr + slot, mask=m_rows, other=0.0)
        total = tl.load(total_ptr + slot, mask=m_rows, other=1.0)
        grad = tl.where(counts, tl.exp(score - peak[:, None]) / total[:, None], 0.0)
        grad = (grad - tl.where(is_target, 1.0, 0.0)) * tl.load(weight_ptr + step)
        tl.store(
            grad_ptr + slot[:, None] * chunk_size + column[None, :], grad, mask=m_rows[:, None] & m_column[None, :]
        )
    else:
        counted = tl.where(counts, score, float("-inf"))
        peak = tl.maximum(tl.max(counted, 1), LOWEST)
        total = tl.sum(tl.exp(counted - peak[:, None]), 1)
        positive = tl.max(tl.where(is_target, score, float("-inf")), 1)
        hardest = tl.max(tl.where(is_target, float("-inf"), counted), 1)
        slot = (step64 * tiles + i_tile) * num_rows + rows64
        plane = tl.cast(num_steps, tl.int64) * tiles * num_rows
        tl.store(sums_ptr + slot, peak, mask=m_rows)
        tl.store(sums_ptr + plane + slot, total, mask=m_rows)
        tl.store(sums_ptr + 2 * plane + slot, positive, mask=m_rows)
        tl.store(sums_ptr + 3 * plane + slot, hardest, mask=m_rows)
