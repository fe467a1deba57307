"""Launches of the forward where a program holds whole rows: `one_row_kernel` or `few_rows_kernel`, then `merge_kernel`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import launching
from .contract import Forward, Inputs, Options
from .few_rows import few_rows_kernel
from .launching import bias_stride, score_flags, score_scalars
from .merge import merge_kernel
from .one_row import one_row_kernel
from .plan import Config, FewRows, OneRow, cdiv, partial_floats


def forward_whole_rows(
    inputs: Inputs, options: Options, plan: OneRow | FewRows, *, stats: bool, exact: bool, finish: bool
) -> Forward:
    """As `launch_forward.forward`. The results are allocated while the first kernel runs."""
    hidden, head = inputs.hidden, inputs.head
    size = partial_floats(plan.splits, hidden.shape[0], head.shape[1])
    partial = torch.empty(size, dtype=torch.float32, device=hidden.device)
    (_launch_one_row if isinstance(plan, OneRow) else _launch_few_rows)(inputs, options, plan, partial, stats)  # type: ignore[operator]
    result = empty_forward(inputs, stats=stats, exact=exact, finish=finish)
    merge(partial, plan.splits, head.shape[0], result, options.embed_scale, finish=finish)
    return result


def _launch_one_row(inputs: Inputs, options: Options, plan: OneRow, partial: Tensor, stats: bool) -> None:
    hidden, head, _, bias, temperature, seeds, threshold = inputs
    launching.launch(
        one_row_kernel,
        (plan.splits,),
        (
            hidden, head, bias, temperature, seeds, threshold, partial,
            head.shape[0], hidden.stride(1), bias_stride(inputs),
            options.vocab_start, *score_scalars(inputs, options), plan.tiles_per_split,
        ),
        plan.config,
        ALIGNED=options.vocab_start % 4 == 0,
        STATS=stats,
        **_shape(head, plan),
    )  # fmt: skip


def _launch_few_rows(inputs: Inputs, options: Options, plan: FewRows, partial: Tensor, stats: bool) -> None:
    hidden, head, _, bias, temperature, seeds, threshold = inputs
    launching.launch(
        few_rows_kernel,
        (plan.splits * plan.row_blocks,),
        (
            hidden, head, bias, temperature, seeds, threshold, partial,
            hidden.shape[0], head.shape[0], *hidden.stride(), bias_stride(inputs),
            options.vocab_start, *score_scalars(inputs, options), plan.tiles_per_split, plan.row_blocks, plan.splits,
        ),
        plan.config,
        **score_flags(inputs, options),
        STATS=stats,
        **_shape(head, plan),
    )  # fmt: skip


def _shape(head: Tensor, plan: OneRow | FewRows) -> dict[str, int]:
    stride_v, stride_d = head.stride()
    stages = plan.config.num_stages  # of the loop over tiles, which Triton does not pipeline by itself
    return {
        "WIDTH": head.shape[1], "STRIDE_V": stride_v, "STRIDE_D": stride_d, "PIECES": plan.pieces, "STAGES": stages
    }  # fmt: skip


def empty_forward(inputs: Inputs, *, stats: bool, exact: bool, finish: bool) -> Forward:
    """The results of a forward, still to be written."""
    hidden, values = inputs.hidden, inputs.head if inputs.embed is None else inputs.embed
    num_rows, shape = hidden.shape[0], (hidden.shape[0], values.shape[1])
    float32 = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    out = torch.empty(shape, dtype=hidden.dtype, device=hidden.device) if finish else float32(shape)
    # float32 inputs, too, get an exact result of its own: the caller may change `out` in place
    kept = float32(shape) if exact and finish else None
    lse, peak, total, *rest = float32((5 if stats else 3, num_rows)).unbind()
    entropy, max_prob = rest if stats else (None, None)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=hidden.device) if stats else None
    return Forward(out, kept, lse, entropy, max_prob, argmax, peak, total)


def merge(partial: Tensor, splits: int, num_vocab: int, result: Forward, embed_scale: float, *, finish: bool) -> None:
    """Partial sums, laid out as `merge` says, into all tensors of `result`."""
    out, exact, lse, entropy, max_prob, argmax, peak, total = result
    num_rows, width = out.shape
    padded = 1 << (splits - 1).bit_length()
    # a program reads all splits of its columns at once: a few wide loads for each of its 128 threads
    block = max(16, min(1024, 16384 // padded, 1 << (width - 1).bit_length()))
    launching.launch(
        merge_kernel,
        (num_rows, cdiv(width, block)),
        (
            partial, out, exact, peak, total, lse, entropy, max_prob, argmax,
            num_rows, splits, num_vocab, width, embed_scale,
        ),
        Config({"BLOCK_E": block}, 4, 1),
        FINISH=finish,
        SPLITS=padded,
    )  # fmt: skip
