"""The forward of `soft_embed`: chooses between one and two passes (`plan`) and launches them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import launching
from .contract import Forward, Inputs, Options
from .launch_many_rows import forward_many_rows
from .launching import bias_stride, device_of, score_flags, score_scalars
from .merge import merge_kernel
from .one_pass import one_pass_kernel
from .plan import Config, Device, OnePass, Problem, TwoProducts, cdiv, plan_forward


def forward(
    inputs: Inputs,
    options: Options,
    *,
    stats: bool = False,
    exact: bool = False,
    finish: bool = True,
    keep: bool = False,
    device: Device | None = None,
) -> Forward:
    """Soft tokens, and with `stats` entropy, max_prob and argmax. `finish=False`: the mergeable sums of a shard."""
    hidden, head, embed = inputs[:3]
    values = head if embed is None else embed
    rows, width = values.new_empty, values.shape[1]
    (num_rows, _), (num_vocab, _) = hidden.shape, head.shape
    float32 = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    out = rows((num_rows, width)) if finish else float32(num_rows, width)
    exact = exact and finish  # float32 too: the caller may change `out` in place
    argmax = torch.empty(num_rows, dtype=torch.int64, device=hidden.device) if stats else None
    result = Forward(
        out,
        float32(num_rows, width) if exact else None,
        float32(num_rows),
        float32(num_rows) if stats else None,
        float32(num_rows) if stats else None,
        argmax,
        float32(num_rows),
        float32(num_rows),
    )
    if num_rows == 0:
        return result
    problem = Problem(num_rows, num_vocab, hidden.shape[1], width, embed is None, hidden.itemsize)
    plan = plan_forward(problem, device or device_of(hidden.device))
    if isinstance(plan, TwoProducts):
        return forward_many_rows(inputs, options, problem, result, stats, finish, keep)
    partials = Partials.empty(plan.splits, num_rows, width, stats, hidden.device)
    _one_pass(inputs, options, plan, partials, stats)
    _merge(partials, result, slice(0, num_rows), num_vocab, options.embed_scale, finish)
    return result


class Partials(NamedTuple):
    """Mergeable softmax sums of each split, float32."""

    acc: Tensor  # [splits, T, E]
    peak: Tensor  # [2, splits, T]: a chunk reads one and writes the other
    total: Tensor  # [splits, T]
    moment: Tensor | None
    argmax: Tensor | None  # int64

    @classmethod
    def empty(cls, splits: int, rows: int, width: int, stats: bool, device: torch.device) -> Partials:
        acc = torch.empty((splits, rows, width), dtype=torch.float32, device=device)
        sums = torch.empty((4, splits, rows), dtype=torch.float32, device=device)
        argmax = torch.empty((splits, rows), dtype=torch.int64, device=device) if stats else None
        return cls(acc, sums[:2], sums[2], sums[3] if stats else None, argmax)


def _one_pass(inputs: Inputs, options: Options, plan: OnePass, partials: Partials, stats: bool) -> None:
    hidden, head, _, bias, temperature, seeds, threshold = inputs
    launching.launch(
        one_pass_kernel,
        (plan.splits * plan.row_blocks,),
        (
            hidden, head, bias, temperature, seeds, threshold,
            partials.acc, partials.peak, partials.total, partials.moment, partials.argmax,
            hidden.shape[0], head.shape[0], head.shape[1],
            *hidden.stride(), *head.stride(), bias_stride(inputs),
            options.vocab_start, *score_scalars(inputs, options), plan.tiles_per_split, plan.row_blocks,
        ),
        plan.config,
        **score_flags(inputs, options),
        STATS=stats,
        WIDTH_0=plan.widths[0],
        WIDTH_1=plan.widths[1],
    )  # fmt: skip


MERGE = Config({"BLOCK_S": 16, "BLOCK_E": 128}, 4, 2)


def _merge(partials: Partials, result: Forward, rows: slice, num_vocab: int, embed_scale: float, finish: bool) -> None:
    if rows.stop - rows.start < result.out.shape[0]:
        result = Forward(*(None if tensor is None else tensor[rows] for tensor in result))  # type: ignore[arg-type]
    out, exact, lse, entropy, max_prob, argmax, peak, total = result
    splits, width = partials.acc.shape[0], out.shape[1]
    launching.launch(
        merge_kernel,
        (rows.stop - rows.start, cdiv(width, MERGE.blocks["BLOCK_E"])),
        (
            partials.acc, partials.peak[0], partials.total, partials.moment, partials.argmax,
            out, exact, peak, total, lse, entropy, max_prob, argmax,
            rows.stop - rows.start, splits, num_vocab, width, embed_scale,
        ),
        MERGE,
        FINISH=finish,
        STATS=argmax is not None,
        EXACT=exact is not None,
        SPLITS=1 << (splits - 1).bit_length(),
    )  # fmt: skip
