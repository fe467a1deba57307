"""Bytes and FLOPs of a call, kernel by kernel, from its plan: what the floor is compared with.

The model counts what must cross the memory bus::

    matrix   a matrix is read once for each pass over it; blocks of rows that run side by side, and the second product
             of a chunk that fits L2, find it there
    partial  what one kernel writes for another to read: partial sums of splits, probabilities of a chunk. Counted in
             full, written and read, though most of it never leaves L2
    rows     hidden, upstream gradients and results, once for each kernel that touches them

FLOPs are those that run, padded tiles included (one row costs what 16 do).
"""

from __future__ import annotations

from typing import NamedTuple

from gircse_kernels.plan import L2_BYTES, Backward, Device, OnePass, Problem, TwoPass, cdiv, plan_backward, plan_forward


class Work(NamedTuple):
    """One kernel's share of a call, over all its launches."""

    kernel: str
    launches: int
    flops: int
    matrix_bytes: int
    partial_bytes: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.matrix_bytes + self.partial_bytes + self.row_bytes


class Floor(NamedTuple):
    """The least that any implementation moves and computes: each matrix once, a tied one once; no padding."""

    flops: int
    bytes: int


def forward_floor(problem: Problem) -> Floor:
    """4 T V D FLOPs (D = E)."""
    rows, vocab, width, value_width, tied, itemsize = problem
    columns = width if tied else width + value_width
    return Floor(2 * rows * vocab * (width + value_width), itemsize * vocab * columns)


def backward_floor(problem: Problem) -> Floor:
    """Frozen matrices: scores again, dP, dh."""
    rows, vocab, width, value_width, tied, itemsize = problem
    columns = width if tied else width + value_width
    return Floor(2 * rows * vocab * (2 * width + value_width), itemsize * vocab * columns)


def forward_work(problem: Problem, device: Device) -> list[Work]:
    """The launches of `soft_embed.forward` without statistics."""
    plan = plan_forward(problem, device)
    work = [_one_pass(problem, plan)] if isinstance(plan, OnePass) else _two_pass(problem, plan)
    return [*work, _merge(problem, plan)]


def _one_pass(problem: Problem, plan: OnePass) -> Work:
    rows, vocab, width, _, _, itemsize = problem
    padded_rows = plan.row_blocks * plan.config.blocks["BLOCK_T"]
    return Work(
        "one_pass_kernel",
        1,
        4 * padded_rows * _up(vocab, plan.config.blocks["BLOCK_V"]) * sum(plan.widths),
        itemsize * vocab * width,
        4 * plan.splits * rows * (width + 2),
        itemsize * rows * width,
    )


def _two_pass(problem: Problem, plan: TwoPass) -> list[Work]:
    rows, vocab, width, value_width, tied, itemsize = problem
    blocks, chunks = cdiv(rows, plan.row_block), cdiv(vocab, plan.chunk)
    tile = plan.score.blocks["BLOCK_V"]
    padded_vocab, tiles = _up(vocab, tile), cdiv(vocab, tile)
    in_cache = tied and itemsize * plan.chunk * width <= L2_BYTES
    # a slot's sums are read and written again for every chunk but the first
    slots = 4 * plan.splits * rows * value_width * (2 * chunks - 1)
    return [
        Work(
            "score_kernel",
            blocks * chunks,
            2 * _up(rows, plan.score.blocks["BLOCK_T"]) * padded_vocab * _up(width, plan.score.blocks["BLOCK_K"]),
            blocks * itemsize * vocab * width,
            itemsize * rows * vocab + 8 * rows * tiles,
            chunks * itemsize * rows * width,
        ),
        Work(
            "weigh_kernel",
            blocks * chunks,
            2 * _up(rows, plan.weigh.blocks["BLOCK_T"]) * padded_vocab * _up(value_width, plan.weigh.blocks["BLOCK_E"]),
            0 if in_cache else blocks * itemsize * vocab * value_width,
            itemsize * rows * vocab + 8 * rows * tiles + slots,
            0,
        ),
    ]


def _merge(problem: Problem, plan: OnePass | TwoPass) -> Work:
    rows, width = problem.rows, problem.value_width
    launches = cdiv(rows, plan.row_block) if isinstance(plan, TwoPass) else 1
    return Work(
        "merge_kernel",
        launches,
        2 * plan.splits * rows * width,
        0,
        4 * plan.splits * rows * (width + 2),
        problem.itemsize * rows * width,
    )


def backward_work(problem: Problem, device: Device) -> list[Work]:
    """The launches of `soft_embed.backward` for frozen matrices."""
    plan: Backward = plan_backward(problem, device, False, False)
    rows, vocab, width, value_width, tied, itemsize = problem
    blocks, chunks = cdiv(rows, plan.row_block), cdiv(vocab, plan.chunk)
    grad, product = plan.score_grad.blocks, plan.product.blocks
    padded_vocab = _up(vocab, grad["BLOCK_V"])
    columns = _up(width, grad["BLOCK_K"]) + _up(value_width, grad["BLOCK_K"])
    in_cache = tied and itemsize * plan.chunk * width <= L2_BYTES
    return [
        Work("constants_kernel", 1, 2 * rows * value_width, 0, 4 * rows, (itemsize + 4) * rows * value_width),
        Work(
            "score_grad_kernel",
            blocks * chunks,
            2 * _up(rows, grad["BLOCK_T"]) * padded_vocab * columns,
            blocks * itemsize * vocab * (width if tied else width + value_width),
            itemsize * rows * vocab,
            chunks * itemsize * rows * (width + value_width),
        ),
        Work(
            "product_kernel",
            blocks * chunks,
            2 * _up(rows, product["BLOCK_T"]) * _up(vocab, product["BLOCK_V"]) * _up(width, product["BLOCK_E"]),
            0 if in_cache else blocks * itemsize * vocab * width,
            itemsize * rows * vocab + 4 * plan.splits * rows * width * (2 * chunks - 1),
            itemsize * rows * width,
        ),
    ]


def _up(size: int, block: int) -> int:
    return cdiv(size, block) * block
