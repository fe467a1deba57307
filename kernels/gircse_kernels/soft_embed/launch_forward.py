"""The forward of `soft_embed`: chooses the form (`plan`) and launches forms 1 and 2, one kernel and a merge."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import launching
from ..contract import Forward, Inputs, Options
from ..launching import device_of, problem_of, score_flags, score_scalars, score_strides, score_tensors
from ..plan import Config, Device, FewRows, OneRow, TwoProducts, cdiv, plan_forward
from .few_rows import few_rows_kernel
from .launch_many_rows import forward_many_rows
from .merge import merge_kernel
from .one_row import one_row_kernel
from .truncation.launch_kept_rows import forward_kept_rows


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
    hidden, problem = inputs.hidden, problem_of(inputs)
    if problem.rows == 0:
        return _empty_forward(inputs, stats, exact, finish)
    if inputs.ids is not None:
        return forward_kept_rows(inputs, options, _empty_forward(inputs, stats, exact, finish), finish)
    plan = plan_forward(problem, device or device_of(hidden.device))
    if isinstance(plan, TwoProducts):
        result = _empty_forward(inputs, stats, exact, finish)
        return forward_many_rows(inputs, options, problem, result, stats, finish, keep)
    partial = torch.empty(plan.scratch(problem) // 4, dtype=torch.float32, device=hidden.device)
    if isinstance(plan, OneRow):
        _one_row(inputs, options, plan, partial, stats)
    else:
        _few_rows(inputs, options, plan, partial, stats)
    result = _empty_forward(inputs, stats, exact, finish)  # while the kernel runs
    _merge(partial, plan.splits, problem.vocab, result, options.embed_scale, finish)
    return result


def _one_row(inputs: Inputs, options: Options, plan: OneRow, partial: Tensor, stats: bool) -> None:
    hidden, head = inputs.hidden, inputs.head
    assert head is not None
    launching.launch(
        one_row_kernel,
        (plan.splits,),
        (
            hidden, head, *score_tensors(inputs), partial,
            head.shape[0], *score_strides(inputs),
            options.vocab_start, *score_scalars(inputs, options), plan.tiles_per_split,
        ),
        plan.config,
        ALIGNED=options.vocab_start % 4 == 0,
        STATS=stats,
        **_shape(inputs, plan),
    )  # fmt: skip


def _few_rows(inputs: Inputs, options: Options, plan: FewRows, partial: Tensor, stats: bool) -> None:
    hidden, head = inputs.hidden, inputs.head
    assert head is not None
    launching.launch(
        few_rows_kernel,
        (plan.splits * plan.row_blocks,),
        (
            hidden, head, *score_tensors(inputs), partial,
            hidden.shape[0], head.shape[0], hidden.stride(0), *score_strides(inputs),
            options.vocab_start, *score_scalars(inputs, options), plan.tiles_per_split, plan.row_blocks, plan.splits,
        ),
        plan.config,
        **score_flags(inputs, options),
        STATS=stats,
        **_shape(inputs, plan),
    )  # fmt: skip


def _shape(inputs: Inputs, plan: OneRow | FewRows) -> dict[str, int]:
    """Numbers that a model does not change, so that they may be compiled in."""
    assert inputs.head is not None
    stride_v, stride_d = inputs.head.stride()
    return {
        "WIDTH": inputs.head.shape[1],
        "STRIDE_HIDDEN": inputs.hidden.stride(1),
        "STRIDE_V": stride_v,
        "STRIDE_D": stride_d,
        "PIECES": plan.pieces,
        "STAGES": plan.config.num_stages,  # of the loop over tiles, which Triton does not pipeline by itself
    }


def _empty_forward(inputs: Inputs, stats: bool, exact: bool, finish: bool) -> Forward:
    """The results of a forward, still to be written."""
    hidden, num_rows = inputs.hidden, inputs.num_rows
    shape = num_rows, inputs.values.shape[1]
    float32 = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    out = torch.empty(shape, dtype=inputs.out_dtype, device=hidden.device) if finish else float32(shape)
    # float32 inputs, too, get an exact result of its own: the caller may change `out` in place
    kept = float32(shape) if exact and finish else None
    # tensors of their own, because a custom op may not return two views of one
    peak, total = (float32(num_rows), float32(num_rows)) if exact or not finish else (None, None)
    lse, entropy, max_prob = (float32(num_rows), float32(num_rows), float32(num_rows)) if stats else (None, None, None)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=hidden.device) if stats else None
    return Forward(out, kept, lse, entropy, max_prob, argmax, peak, total)


def _merge(partial: Tensor, splits: int, num_vocab: int, result: Forward, embed_scale: float, finish: bool) -> None:
    """Partial sums, laid out as `merge` says, into all tensors of `result`."""
    out, exact, lse, entropy, max_prob, argmax, peak, total, _ = result
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
