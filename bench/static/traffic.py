"""Bytes and FLOPs, kernel by kernel, of a call of `soft_embed`, from its plan, and of a decode step of the body: what
their floors are compared with.

The model counts what must cross the memory bus::

    matrix   a matrix is read once by each product with it; blocks of rows that run side by side find it in L2. In a
             decode step keys and values count here, too
    partial  what one kernel writes for another to read: partial sums of shares, scores and probabilities of a chunk,
             sums over chunks. Counted in full, written and read, though some of it never leaves L2
    rows     hidden states, upstream gradients and results, once for each kernel that touches them

FLOPs are those of matrix products as they run, with the padding of our own kernels. Exponentials are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from gircse_kernels.decoder.attention import SLICE
from gircse_kernels.plan import (
    Device,
    FewRows,
    OneRow,
    Problem,
    TwoProducts,
    cdiv,
    partial_floats,
    plan_backward,
    plan_forward,
    plan_select,
    plan_two_products,
)

from gircse.roofline import ModelFacts

PRODUCT = "cuBLAS"  # the name of a product that is none of our kernels


class Work(NamedTuple):
    """One kernel's share of a call, over all its launches."""

    kernel: str
    launches: int
    flops: int = 0
    matrix_bytes: int = 0
    partial_bytes: int = 0
    row_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.matrix_bytes + self.partial_bytes + self.row_bytes


class Floor(NamedTuple):
    """The least that any implementation moves and computes: each matrix once, a tied one once; no padding."""

    flops: int
    bytes: int


def forward_floor(problem: Problem) -> Floor:
    """4 T V D FLOPs (D = E). Given logits: 2 T V E, and they are read once."""
    rows, vocab, width, value_width, tied, itemsize = problem
    columns = (width if tied else width + value_width) + (rows if width == 0 else 0)
    return Floor(2 * rows * vocab * (width + value_width), itemsize * vocab * columns)


def backward_floor(problem: Problem) -> Floor:
    """Frozen matrices: scores again, dP, dh. Given logits: they are read, dP is made, their gradient is written."""
    rows, vocab, width, value_width, tied, itemsize = problem
    columns = (width if tied else width + value_width) + (2 * rows if width == 0 else 0)
    return Floor(2 * rows * vocab * (2 * width + value_width), itemsize * vocab * columns)


def forward_plan(problem: Problem, device: Device, *, kept: int = 0) -> OneRow | FewRows | TwoProducts:
    """The plan of a call that wants the result alone, or, with `kept` bytes, a gradient as well."""
    plan = plan_forward(problem, device)
    if isinstance(plan, TwoProducts):
        return plan_two_products(problem, device, epilogue=True, kept=kept)
    return plan


def forward_work(problem: Problem, device: Device, *, kept: int = 0) -> list[Work]:
    """The launches of a forward without statistics."""
    plan = forward_plan(problem, device, kept=kept)
    return _two_products(problem, plan) if isinstance(plan, TwoProducts) else _whole_rows(problem, plan)


def _whole_rows(problem: Problem, plan: OneRow | FewRows) -> list[Work]:
    rows, vocab, width, value_width, _, itemsize = problem
    blocks, one = plan.config.blocks, isinstance(plan, OneRow)
    padded_rows = 1 if isinstance(plan, OneRow) else plan.row_blocks * blocks["BLOCK_T"]
    partial, result = 4 * partial_floats(plan.splits, rows, width), itemsize * rows * value_width
    flops = 4 * padded_rows * _up(vocab, blocks["BLOCK_V"]) * plan.pieces * blocks["PIECE"]
    kernel = "one_row_kernel" if one else "few_rows_kernel"
    return [
        Work(kernel, 1, flops, itemsize * vocab * width, partial, itemsize * rows * width),
        Work("merge_kernel", 1, partial_bytes=partial, row_bytes=result),
    ]


def _two_products(problem: Problem, plan: TwoProducts) -> list[Work]:
    rows, vocab, width, value_width, _, itemsize = problem
    blocks, chunks = cdiv(rows, plan.row_block), cdiv(vocab, plan.chunk)
    launches, hidden = blocks * chunks, chunks * itemsize * rows * width
    scores = rows * vocab * (itemsize if plan.half_scores or width == 0 else 4)
    probs, sums = itemsize * rows * vocab, 12 * rows * cdiv(vocab, plan.tile)
    accumulator = 4 * rows * value_width * (2 * chunks - 1)  # written, and read and written by every further chunk
    head, flops = blocks * itemsize * vocab * width, 2 * rows * vocab * width
    if plan.product is None:
        first = [Work("weights_kernel", launches, partial_bytes=scores + probs + sums)]
        if width > 0:
            first.insert(0, Work(PRODUCT, launches, flops, head, scores, hidden))
    else:
        tile = plan.product.blocks
        flops = 2 * _up(rows, tile["BLOCK_T"]) * _up(vocab, tile["BLOCK_V"]) * _up(width, tile["BLOCK_K"])
        first = [Work("weights_product_kernel", launches, flops, head, probs + sums, hidden)]
    values = blocks * itemsize * vocab * value_width
    return [
        *first,
        Work("settle_kernel", launches, partial_bytes=sums),
        Work(PRODUCT, launches, 2 * rows * vocab * value_width, values, probs + accumulator),
        Work("finish_kernel", blocks, partial_bytes=4 * rows * value_width, row_bytes=itemsize * rows * value_width),
    ]


def backward_work(problem: Problem, device: Device, *, kept: bool = False) -> list[Work]:
    """The launches of a backward with frozen matrices; with `kept` P is there and scores are not recomputed."""
    plan = plan_backward(problem, device, False, False)
    rows, vocab, width, value_width, tied, itemsize = problem
    blocks, chunks = cdiv(rows, plan.row_block), cdiv(vocab, plan.chunk)
    launches = blocks * chunks
    scores, grad_probs = rows * vocab * (itemsize if plan.half_scores or width == 0 else 4), 4 * rows * vocab
    head, values = (blocks * itemsize * vocab * columns for columns in (width, value_width))
    hidden, upstream = (chunks * itemsize * rows * columns for columns in (width, value_width))
    grad = itemsize * rows * vocab
    sums = [Work(PRODUCT, launches, 2 * rows * vocab * value_width, values, grad_probs, upstream)]
    if not kept and tied and not plan.half_scores:  # one product of both row by row
        sums = [Work(PRODUCT, launches, 4 * rows * vocab * width, head, scores + grad_probs, hidden + upstream)]
    elif not kept and width > 0:
        sums.append(Work(PRODUCT, launches, 2 * rows * vocab * width, head, scores, hidden))
    read = grad_probs + (grad if kept else scores)
    accumulator = 4 * rows * width * (2 * chunks - 1)
    work = [
        Work("constants_kernel", 1, row_bytes=4 * rows + (itemsize + 4) * rows * value_width),
        *sums,
        Work("score_grad_kernel", launches, partial_bytes=read + grad),
    ]
    if width > 0:
        work.append(Work(PRODUCT, launches, 2 * rows * vocab * width, head, grad + accumulator))
    return work


def lists_floor(problem: Problem, kept: int) -> Floor:
    """Of rows that keep `kept` entries each: the head once, and these rows of the embedding matrix."""
    rows, vocab, width, value_width, _, itemsize = problem
    return Floor(2 * rows * vocab * width, itemsize * (vocab * width + rows * kept * value_width))


def lists_work(problem: Problem, device: Device, kept: int, capacity: int) -> list[Work]:
    """The launches of a forward of rows that keep `kept` entries each, among `capacity` candidates."""
    rows, vocab, width, value_width, _, itemsize = problem
    plan = plan_select(rows, vocab, itemsize, device, capacity)
    launches = cdiv(rows, plan.row_block)
    scores, sums = 4 * rows * vocab, rows * (4 * plan.groups + 20 * plan.tiles)
    head, hidden = launches * itemsize * vocab * width, itemsize * rows * width
    group, lists = plan.select.blocks["GROUP"], 12 * rows * capacity
    return [
        Work(PRODUCT, launches, 2 * rows * vocab * width, head, scores, hidden),
        Work("weights_kernel", launches, partial_bytes=scores + sums),
        Work("select_kernel", launches, partial_bytes=sums + 4 * rows * 2 * capacity * group + lists),
        Work("kept_forward_kernel", 1, 0, itemsize * rows * kept * value_width, lists, itemsize * rows * value_width),
    ]


def step_work(facts: ModelFacts, inner: int, rows: int, cached: int) -> list[Work]:
    """The body's part of a decode step of `rows` rows that see `cached` slots each, without biases and norms of heads.

    Args:
        inner: I, columns of the MLP.
    """
    s, layers, width, size = facts.itemsize, facts.layers, facts.hidden, facts.head_dim
    queries, both = facts.heads * size, (facts.heads + 2 * facts.kv_heads) * size
    products = [(width, both), (queries, width), (width, 2 * inner), (inner, width)]
    slices = cdiv(cached, SLICE)
    partial = 8 * rows * layers * (queries + 2 * facts.heads) * slices if slices > 1 else 0
    return [
        Work("add_rms_norm_kernel", 2 * layers + 1, row_bytes=s * rows * width * (4 * 2 * layers + 3)),
        Work(
            PRODUCT,
            4 * layers,
            2 * rows * layers * sum(n * m for n, m in products),
            s * layers * sum(n * m for n, m in products),
            row_bytes=s * rows * layers * sum(n + m for n, m in products),
        ),
        Work("rotary_write_kernel", layers, row_bytes=s * rows * layers * (both + queries + 3 * facts.kv_heads * size)),
        Work(
            "decode_attention_kernel",
            layers,
            4 * rows * layers * queries * cached,
            s * rows * layers * 2 * facts.kv_heads * size * cached,
            partial,
            s * rows * layers * 2 * queries,
        ),
        Work("gated_kernel", layers, row_bytes=s * rows * layers * 3 * inner),
    ]


def _up(size: int, block: int) -> int:
    return cdiv(size, block) * block
