"""The softmax of a piece of similarities [K, B, C] and its gradient; the products on both sides of it are cuBLAS's.

`softmax_sums_kernel` folds a piece into what is known of each row::

    peak = max s,  total = sum e^(s - peak)            over the candidates that count
    positive = s at the target,  hardest = max s over the counted ones that are not the target

`softmax_grad_kernel`, with the peak and total of the whole row, makes the piece of the gradient of the logits::

    G = weight_k (e^(s - peak) / total - [target])

in the bfloat16 parts that the next products take. One program owns one row: no atomics.
"""

import triton
import triton.language as tl

from ..scores import LOWEST
from .parts import store_parts


@triton.jit
def counted_scores(
    scores_ptr, exclude_ptr, mask_ptr, row, row_scores, column, num_columns, stride_mask, scale,
    HAS_EXCLUDE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Logits at `column`, and which of them count."""
    counts = column < num_columns
    score = tl.load(scores_ptr + row_scores + column, mask=counts, other=float("-inf")) * scale
    if HAS_EXCLUDE:
        counts = counts & (column != tl.load(exclude_ptr + row))
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + row * stride_mask + column, mask=counts, other=1) == 0)
    return score, counts


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def softmax_sums_kernel(
    scores_ptr,  # [K, B, C] float32, products of unit vectors
    target_ptr,  # [B] int64, each row's positive; negative: not among these candidates
    exclude_ptr,  # [B] int64, a candidate that does not count for its row; negative: none
    mask_ptr,  # [B, C] int8, 1: does not count
    peak_ptr,  # [K, B] float32, in and out, as are the next three
    total_ptr,
    positive_ptr,
    hardest_ptr,
    num_rows,
    num_columns,
    stride_mask,
    scale,  # 1 / temperature
    FIRST: tl.constexpr,  # nothing is known of the rows yet
    HAS_EXCLUDE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1).to(tl.int64) * num_rows + row
    target = tl.load(target_ptr + row)
    # each lane keeps its own columns' numbers until the end
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    positive = tl.full([BLOCK], float("-inf"), tl.float32)
    hardest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score, counts = counted_scores(
            scores_ptr, exclude_ptr, mask_ptr, row, slot * num_columns, column, num_columns, stride_mask, scale,
            HAS_EXCLUDE, HAS_MASK,
        )  # fmt: skip
        is_target = column == target
        counted = tl.where(counts, score, float("-inf"))
        higher = tl.maximum(peak, counted)
        total = total * tl.exp(peak - higher) + tl.exp(counted - higher)
        peak = higher
        positive = tl.where(is_target, score, positive)
        hardest = tl.maximum(hardest, tl.where(is_target, float("-inf"), counted))
    highest = tl.max(peak, 0)
    best, second = tl.max(positive, 0), tl.max(hardest, 0)
    old = 0.0
    if not FIRST:
        before = tl.load(peak_ptr + slot)
        highest = tl.maximum(highest, before)
        old = tl.load(total_ptr + slot) * tl.exp(before - highest)
        best = tl.maximum(best, tl.load(positive_ptr + slot))
        second = tl.maximum(second, tl.load(hardest_ptr + slot))
    tl.store(peak_ptr + slot, highest)
    tl.store(total_ptr + slot, old + tl.sum(total * tl.exp(peak - highest), 0))
    tl.store(positive_ptr + slot, best)
    tl.store(hardest_ptr + slot, second)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def softmax_grad_kernel(
    scores_ptr,  # [K, B, C] float32, products of unit vectors
    target_ptr,  # [B] int64, as above
    exclude_ptr,  # [B] int64, as above
    mask_ptr,  # [B, C] int8, as above
    peak_ptr,  # [K, B] float32
    total_ptr,  # [K, B] float32
    weight_ptr,  # [K] float32
    grad_ptr,  # [K, B, PARTS, C] bfloat16, out
    num_rows,
    num_columns,
    stride_mask,
    scale,  # 1 / temperature
    HAS_EXCLUDE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1).to(tl.int64) * num_rows + row
    target = tl.load(target_ptr + row)
    peak = tl.load(peak_ptr + slot)
    # the derivative of a logit by the product is the scale
    weight = tl.load(weight_ptr + tl.program_id(1)) * scale
    over = weight / tl.load(total_ptr + slot)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score, counts = counted_scores(
            scores_ptr, exclude_ptr, mask_ptr, row, slot * num_columns, column, num_columns, stride_mask, scale,
            HAS_EXCLUDE, HAS_MASK,
        )  # fmt: skip
        grad = tl.where(counts, tl.exp(score - peak) * over, 0.0) - tl.where(column == target, weight, 0.0)
        here = grad_ptr + slot * PARTS * num_columns + column
        store_parts(here, num_columns, grad, column < num_columns, PARTS)
