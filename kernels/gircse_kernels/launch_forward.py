"""The forward of `soft_embed`: chooses between one and two passes (`plan`) and launches them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launching, two_pass
from .contract import Forward, Inputs, Options
from .launch_whole_rows import empty_forward, forward_whole_rows
from .launching import bias_stride, device_of, score_flags, score_scalars
from .plan import Config, Device, Problem, TwoPass, cdiv, plan_forward
from .two_pass import merge_kernel


def forward(
    inputs: Inputs,
    options: Options,
    *,
    stats: bool = False,
    exact: bool = False,
    finish: bool = True,
    device: Device | None = None,
) -> Forward:
    """Soft tokens, and with `stats` entropy, max_prob and argmax. `finish=False`: the mergeable sums of a shard."""
    hidden, head, embed = inputs[:3]
    width = (head if embed is None else embed).shape[1]
    num_rows = hidden.shape[0]
    if num_rows == 0:
        return empty_forward(inputs, stats=stats, exact=exact, finish=finish)
    problem = Problem(num_rows, head.shape[0], hidden.shape[1], width, embed is None, hidden.itemsize)
    plan = plan_forward(problem, device or device_of(hidden.device))
    if not isinstance(plan, TwoPass):
        return forward_whole_rows(inputs, options, plan, stats=stats, exact=exact, finish=finish)
    result = empty_forward(inputs, stats=stats, exact=exact, finish=finish)
    _two_pass(inputs, options, plan, result, stats, finish)
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


def _two_pass(inputs: Inputs, options: Options, plan: TwoPass, result: Forward, stats: bool, finish: bool) -> None:
    hidden, head, embed, bias, temperature, seeds, threshold = inputs
    values = head if embed is None else embed
    (num_rows, num_vocab), (width, device) = (hidden.shape[0], head.shape[0]), (values.shape[1], hidden.device)
    tile = plan.score.blocks["BLOCK_V"]
    tiles = cdiv(plan.chunk, tile)
    partials = Partials.empty(plan.splits, plan.row_block, width, stats, device)
    probs = torch.empty((plan.row_block, plan.chunk), dtype=hidden.dtype, device=device)
    tile_sums = torch.empty((3, tiles, plan.row_block), dtype=torch.float32, device=device)
    tile_argmax = torch.empty((tiles, plan.row_block), dtype=torch.int64, device=device) if stats else None
    flags, scalars = score_flags(inputs, options), score_scalars(inputs, options)
    for start in range(0, num_rows, plan.row_block):
        rows = slice(start, min(start + plan.row_block, num_rows))
        count = rows.stop - rows.start
        block = hidden[rows]
        old, new = partials.peak.unbind()
        for chunk_start in range(0, num_vocab, plan.chunk):
            size = min(plan.chunk, num_vocab - chunk_start)
            launching.launch(
                two_pass.score_kernel,
                (cdiv(count, plan.score.blocks["BLOCK_T"]) * cdiv(size, tile),),
                (
                    block, head, bias,
                    *(None if tensor is None else tensor[rows] for tensor in (temperature, seeds, threshold)),
                    probs, tile_sums[0], tile_sums[1], tile_sums[2], tile_argmax,
                    count, num_vocab, head.shape[1],
                    *block.stride(), *head.stride(), bias_stride(inputs), probs.stride(0),
                    options.vocab_start, chunk_start, size, *scalars,
                ),
                plan.score,
                **flags,
                STATS=stats,
                RAW=False,
            )  # fmt: skip
            launching.launch(
                two_pass.weigh_kernel,
                (
                    cdiv(count, plan.weigh.blocks["BLOCK_T"]) * cdiv(width, plan.weigh.blocks["BLOCK_E"]),
                    plan.splits,
                ),
                (
                    probs, values, tile_sums[0], tile_sums[1], tile_sums[2], tile_argmax,
                    partials.acc, old, new, partials.total, partials.moment, partials.argmax,
                    count, width, probs.stride(0), *values.stride(), chunk_start, size, plan.tiles_per_split,
                ),
                plan.weigh,
                FIRST=chunk_start == 0,
                STATS=stats,
                PRECISION=flags["PRECISION"],
                TILE=tile,
            )  # fmt: skip
            old, new = new, old
        _merge(partials._replace(peak=old[None]), result, rows, num_vocab, options.embed_scale, finish)


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


def chunk_scores(inputs: Inputs, options: Options, chunk_start: int, size: int) -> Tensor:
    """Scores [T, size] of a chunk of the vocabulary, float32."""
    hidden, head, _, bias, temperature, seeds, threshold = inputs
    num_rows = hidden.shape[0]
    out = torch.empty((num_rows, size), dtype=torch.float32, device=hidden.device)
    if num_rows == 0:
        return out
    problem = Problem(num_rows, head.shape[0], head.shape[1], 1, False, hidden.itemsize)
    plan = plan_forward(problem, device_of(hidden.device))
    assert isinstance(plan, TwoPass)
    launching.launch(
        two_pass.score_kernel,
        (cdiv(num_rows, plan.score.blocks["BLOCK_T"]) * cdiv(size, plan.score.blocks["BLOCK_V"]),),
        (
            hidden, head, bias, temperature, seeds, threshold, out, None, None, None, None,
            num_rows, head.shape[0], head.shape[1],
            *hidden.stride(), *head.stride(), bias_stride(inputs), out.stride(0),
            options.vocab_start, chunk_start, size, *score_scalars(inputs, options),
        ),
        plan.score,
        **score_flags(inputs, options),
        STATS=False,
        RAW=True,
    )  # fmt: skip
    return out
