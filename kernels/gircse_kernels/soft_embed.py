"""Launchers of the `soft_embed` kernels: tensors in, tensors out. No autograd, no argument checks.

`forward` chooses between one and two passes (`plan`), `backward` recomputes the scores from what `forward` kept. All
tensors are on one device; hidden, head, embed, bias and the upstream gradient have one dtype (bfloat16, float16 or
float32, whose products are 3xTF32, never plain TF32). Matrices may have any strides. Nothing here waits for the device
or depends on its values, so both can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backward as backward_kernels
from . import two_pass
from .merge import merge_kernel
from .one_pass import one_pass_kernel
from .plan import Backward, Config, Device, OnePass, Problem, TwoPass, cdiv, plan_backward, plan_forward

INTERPRETED = not hasattr(one_pass_kernel, "cache_key")  # TRITON_INTERPRET=1 was set when this was imported
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Options(NamedTuple):
    """The scalar parameters."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    seed: int | None = None  # one for all rows
    vocab_start: int = 0  # first vocabulary index of this shard, for the noise


class Inputs(NamedTuple):
    """The tensors of the forward."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    embed: Tensor | None = None  # [V, E]; None: head
    bias: Tensor | None = None  # [V]
    temperature: Tensor | None = None  # [T], instead of the scalar
    seeds: Tensor | None = None  # [T] int64, instead of the scalar


class Forward(NamedTuple):
    """Results; a tensor that nobody asked for is None."""

    out: Tensor  # [T, E], input dtype; float32 where not finished
    exact: Tensor | None  # [T, E] float32: `out` before it is rounded
    lse: Tensor  # [T] float32, as all below
    entropy: Tensor | None  # sum of e^(s - peak) (s - peak) where not finished
    max_prob: Tensor | None
    argmax: Tensor | None  # int64, index in this head
    peak: Tensor
    total: Tensor


class Saved(NamedTuple):
    """What backward needs of the forward."""

    out: Tensor  # [T, E], as exact as there is
    peak: Tensor  # [T]
    total: Tensor  # [T]
    entropy: Tensor | None  # [T], where it has a gradient


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    head: bool
    embed: bool
    bias: bool
    temperature: bool


class Grads(NamedTuple):
    """Gradients; a tensor that nobody asked for is None.

    Over a vocabulary shard, hidden's and temperature's are this shard's share of a sum. The temperature's is finished
    by the caller, who knows the whole of it: `(sum over shards - peak grad_lse) / temperature`.
    """

    hidden: Tensor | None  # float32
    head: Tensor | None  # the head's dtype
    embed: Tensor | None  # embed's dtype
    bias: Tensor | None  # float32
    temperature: Tensor | None  # float32, -sum of dS (s - peak)


@functools.lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """Its architecture and multiprocessors; the interpreter poses as a small H100."""
    if device.type != "cuda":
        return Device(90, 4)
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, **constants: Any) -> None:
    """The one place where a kernel starts; tools that compile or count without a device replace it."""
    kernel[grid](*arguments, **constants, **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages)


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
    hidden, head, embed, _, _, _ = inputs
    values = head if embed is None else embed
    rows, width = values.new_empty, values.shape[1]
    (num_rows, _), (num_vocab, _) = hidden.shape, head.shape
    float32 = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    out = rows((num_rows, width)) if finish else float32(num_rows, width)
    exact = exact and finish and out.dtype != torch.float32
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
    if isinstance(plan, OnePass):
        partials = Partials.empty(plan.splits, num_rows, width, stats, hidden.device)
        _one_pass(inputs, options, plan, partials, stats)
        _merge(partials, result, slice(0, num_rows), num_vocab, options.embed_scale, finish)
    else:
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


def _score_flags(inputs: Inputs, options: Options) -> dict[str, Any]:
    """Compile-time switches of everything that computes scores."""
    return {
        "HAS_BIAS": inputs.bias is not None,
        "HAS_TEMPERATURE": inputs.temperature is not None,
        "CAPPED": options.softcap is not None,
        "GUMBEL": 2 if inputs.seeds is not None else 1 if options.seed is not None else 0,
        "ALIGNED": options.vocab_start % 4 == 0,
        "PRECISION": _precision(inputs.hidden.dtype),
    }


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32x3"
    return "widen" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def _score_scalars(options: Options) -> tuple[int, float, float, float]:
    """seed, scale, softcap, 1 / temperature, as `numerics.scores` wants them."""
    cap = options.softcap
    scale = options.logit_scale if cap is None else options.logit_scale / cap
    return options.seed or 0, scale, cap or 0.0, 1.0 / options.temperature


def _bias_stride(inputs: Inputs) -> int:
    return 0 if inputs.bias is None else inputs.bias.stride(0)


def _one_pass(inputs: Inputs, options: Options, plan: OnePass, partials: Partials, stats: bool) -> None:
    hidden, head, _, bias, temperature, seeds = inputs
    launch(
        one_pass_kernel,
        (plan.splits * plan.row_blocks,),
        (
            hidden, head, bias, temperature, seeds,
            partials.acc, partials.peak, partials.total, partials.moment, partials.argmax,
            hidden.shape[0], head.shape[0], head.shape[1],
            *hidden.stride(), *head.stride(), _bias_stride(inputs),
            options.vocab_start, *_score_scalars(options), plan.tiles_per_split, plan.row_blocks,
        ),
        plan.config,
        **_score_flags(inputs, options),
        STATS=stats,
        WIDTH_0=plan.widths[0],
        WIDTH_1=plan.widths[1],
    )  # fmt: skip


def _two_pass(inputs: Inputs, options: Options, plan: TwoPass, result: Forward, stats: bool, finish: bool) -> None:
    hidden, head, embed, bias, temperature, seeds = inputs
    values = head if embed is None else embed
    (num_rows, num_vocab), (width, device) = (hidden.shape[0], head.shape[0]), (values.shape[1], hidden.device)
    tile = plan.score.blocks["BLOCK_V"]
    tiles = cdiv(plan.chunk, tile)
    partials = Partials.empty(plan.splits, plan.row_block, width, stats, device)
    probs = torch.empty((plan.row_block, plan.chunk), dtype=hidden.dtype, device=device)
    tile_sums = torch.empty((3, tiles, plan.row_block), dtype=torch.float32, device=device)
    tile_argmax = torch.empty((tiles, plan.row_block), dtype=torch.int64, device=device) if stats else None
    flags, scalars = _score_flags(inputs, options), _score_scalars(options)
    for start in range(0, num_rows, plan.row_block):
        rows = slice(start, min(start + plan.row_block, num_rows))
        count = rows.stop - rows.start
        block = hidden[rows]
        old, new = partials.peak.unbind()
        for chunk_start in range(0, num_vocab, plan.chunk):
            size = min(plan.chunk, num_vocab - chunk_start)
            launch(
                two_pass.score_kernel,
                (cdiv(count, plan.score.blocks["BLOCK_T"]) * cdiv(size, tile),),
                (
                    block, head, bias,
                    None if temperature is None else temperature[rows], None if seeds is None else seeds[rows],
                    probs, tile_sums[0], tile_sums[1], tile_sums[2], tile_argmax,
                    count, num_vocab, head.shape[1],
                    *block.stride(), *head.stride(), _bias_stride(inputs), probs.stride(0),
                    options.vocab_start, chunk_start, size, *scalars,
                ),
                plan.score,
                **flags,
                STATS=stats,
                RAW=False,
            )  # fmt: skip
            launch(
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
    launch(
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
    hidden, head, _, bias, temperature, seeds = inputs
    num_rows = hidden.shape[0]
    out = torch.empty((num_rows, size), dtype=torch.float32, device=hidden.device)
    if num_rows == 0:
        return out
    problem = Problem(num_rows, head.shape[0], head.shape[1], 1, False, hidden.itemsize)
    plan = plan_forward(problem, device_of(hidden.device))
    assert isinstance(plan, TwoPass)
    launch(
        two_pass.score_kernel,
        (cdiv(num_rows, plan.score.blocks["BLOCK_T"]) * cdiv(size, plan.score.blocks["BLOCK_V"]),),
        (
            hidden, head, bias, temperature, seeds, out, None, None, None, None,
            num_rows, head.shape[0], head.shape[1],
            *hidden.stride(), *head.stride(), _bias_stride(inputs), out.stride(0),
            options.vocab_start, chunk_start, size, *_score_scalars(options),
        ),
        plan.score,
        **_score_flags(inputs, options),
        STATS=False,
        RAW=True,
    )  # fmt: skip
    return out


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    *,
    device: Device | None = None,
) -> Grads:
    """Gradients from grad_out [T, E], grad_lse [T], grad_entropy [T]; None: zero.

    `saved.peak` and `saved.total` may be those of a whole vocabulary of which `head` is one shard.
    """
    hidden, head, embed, bias, temperature, _ = inputs
    values = head if embed is None else embed
    (num_rows, width), (num_vocab, value_width) = hidden.shape, values.shape
    # the kernels take a number of each row to lie beside the next row's; the gradients of a sum have stride 0
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    saved = Saved(*(None if tensor is None else tensor.contiguous() for tensor in saved))  # type: ignore[arg-type]
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device=hidden.device)
    need_values = (needs.embed if embed is not None else needs.head) and grad_out is not None
    need_temperature = needs.temperature and temperature is not None
    need_bias = needs.bias and bias is not None
    need_scores = needs.hidden or needs.head or need_bias or need_temperature
    empty = num_rows == 0 or not (need_scores or need_values)
    problem = Problem(max(1, num_rows), num_vocab, width, value_width, embed is None, hidden.itemsize)
    plan = plan_backward(problem, device or device_of(hidden.device), need_values, needs.head)
    # The kernels write every element; without rows none of them runs.
    make = functools.partial(torch.zeros if empty else torch.empty, device=hidden.device)
    slots = make((plan.splits, num_rows, width), dtype=torch.float32) if needs.hidden else None
    grad_head = make(head.shape, dtype=head.dtype) if needs.head else None
    grad_embed = None
    if embed is not None and needs.embed:
        make_embed = make if need_values else functools.partial(torch.zeros, device=hidden.device)
        grad_embed = make_embed(embed.shape, dtype=embed.dtype)
    grad_bias = zeros(num_vocab) if need_bias else None
    grad_temperature = zeros(num_rows) if need_temperature else None
    if not empty:
        if grad_out is None:
            grad_out = hidden.new_zeros((1, 1)).expand(num_rows, value_width)
            has_grad = False
        else:
            has_grad = True
        constant = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        launch(
            backward_kernels.constants_kernel,
            (num_rows,),
            (
                grad_out, saved.out, grad_lse, grad_entropy, saved.entropy, saved.total, constant,
                num_rows, value_width, *grad_out.stride(),
            ),
            Config({"BLOCK_E": min(1024, 1 << (value_width - 1).bit_length())}, 4, 1),
            HAS_GRAD=has_grad,
            HAS_LSE=grad_lse is not None,
            HAS_ENTROPY=grad_entropy is not None,
        )  # fmt: skip
        walk = _BackwardWalk(inputs, options, saved, plan, grad_out, grad_entropy, constant, has_grad)
        walk.run(slots, grad_head, grad_embed, grad_bias, grad_temperature, need_scores, need_values)
    grad_hidden = None
    if slots is not None:
        grad_hidden = slots[0] if slots.shape[0] == 1 else slots.sum(0)
    if grad_temperature is not None:
        grad_temperature = grad_temperature.neg_()
    return Grads(grad_hidden, grad_head, grad_embed, grad_bias, grad_temperature)


class _BackwardWalk:
    """The loop over chunks and blocks of rows, and the scratch of one of each."""

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        saved: Saved,
        plan: Backward,
        grad_out: Tensor,
        grad_entropy: Tensor | None,
        constant: Tensor,
        has_grad: bool,
    ) -> None:
        self.inputs, self.options, self.saved, self.plan = inputs, options, saved, plan
        self.grad_out, self.grad_entropy, self.constant, self.has_grad = grad_out, grad_entropy, constant, has_grad
        self.flags, self.scalars = _score_flags(inputs, options), _score_scalars(options)
        self.precision = {"PRECISION": self.flags["PRECISION"]}

    def run(
        self,
        slots: Tensor | None,
        grad_head: Tensor | None,
        grad_embed: Tensor | None,
        grad_bias: Tensor | None,
        grad_temperature: Tensor | None,
        need_scores: bool,
        need_values: bool,
    ) -> None:
        hidden, head, embed = self.inputs[:3]
        plan, num_rows, num_vocab = self.plan, hidden.shape[0], head.shape[0]
        device, float32 = hidden.device, torch.float32
        tiles = cdiv(plan.chunk, plan.score_grad.blocks["BLOCK_V"])
        row_tiles = cdiv(plan.row_block, plan.score_grad.blocks["BLOCK_T"])
        chunk = (plan.row_block, plan.chunk)
        score_grad = torch.empty(chunk, dtype=hidden.dtype, device=device) if need_scores else None
        probs = torch.empty(chunk, dtype=hidden.dtype, device=device) if need_values else None
        temperature_part = bias_part = head_sum = embed_sum = None
        if grad_temperature is not None:
            temperature_part = torch.empty((tiles, plan.row_block), dtype=float32, device=device)
        if grad_bias is not None:
            bias_part = torch.empty((row_tiles, plan.chunk), dtype=float32, device=device)
        if num_rows > plan.row_block:
            if grad_head is not None:
                head_sum = torch.empty((plan.chunk, head.shape[1]), dtype=float32, device=device)
            if grad_embed is not None and embed is not None and need_values:
                embed_sum = torch.empty((plan.chunk, embed.shape[1]), dtype=float32, device=device)
        for chunk_start in range(0, num_vocab, plan.chunk):
            size = min(plan.chunk, num_vocab - chunk_start)
            for start in range(0, num_rows, plan.row_block):
                rows = slice(start, min(start + plan.row_block, num_rows))
                block, grad_block, count = hidden[rows], self.grad_out[rows], rows.stop - rows.start
                self._score_grad(rows, chunk_start, size, score_grad, probs, temperature_part, bias_part)
                if grad_temperature is not None and temperature_part is not None:
                    used = cdiv(size, plan.score_grad.blocks["BLOCK_V"])
                    # laid out by the rows of this block
                    part = temperature_part.flatten()[: used * count].view(used, count)
                    grad_temperature[rows] += part.sum(0)
                if grad_bias is not None and bias_part is not None:
                    used = cdiv(count, plan.score_grad.blocks["BLOCK_T"])
                    grad_bias[chunk_start : chunk_start + size] += bias_part[:used, :size].sum(0)
                if slots is not None and score_grad is not None:
                    self._product(score_grad, slots, rows, chunk_start, size)
                first, last = rows.start == 0, rows.stop == num_rows
                if grad_head is not None and score_grad is not None:
                    dual = (probs, grad_block) if embed is None and probs is not None else None
                    self._vocab_grad(
                        (score_grad, block), dual, head_sum, grad_head, count, chunk_start, size, first, last
                    )
                if grad_embed is not None and probs is not None:
                    self._vocab_grad(
                        (probs, grad_block), None, embed_sum, grad_embed, count, chunk_start, size, first, last
                    )

    def _score_grad(
        self,
        rows: slice,
        chunk_start: int,
        size: int,
        score_grad: Tensor | None,
        probs: Tensor | None,
        temperature_part: Tensor | None,
        bias_part: Tensor | None,
    ) -> None:
        hidden, head, embed, bias, temperature, seeds = self.inputs
        values = head if embed is None else embed
        blocks, count = self.plan.score_grad.blocks, rows.stop - rows.start
        block, grad_block = hidden[rows], self.grad_out[rows]
        slope = self.grad_entropy
        launch(
            backward_kernels.score_grad_kernel,
            (cdiv(count, blocks["BLOCK_T"]) * cdiv(size, blocks["BLOCK_V"]),),
            (
                block, head, grad_block, values, bias,
                None if temperature is None else temperature[rows], None if seeds is None else seeds[rows],
                self.saved.peak[rows], self.saved.total[rows], self.constant[rows],
                None if slope is None else slope[rows],
                score_grad, probs, temperature_part, bias_part,
                count, head.shape[0], head.shape[1], values.shape[1],
                *block.stride(), *head.stride(), *grad_block.stride(), *values.stride(), _bias_stride(self.inputs),
                self.plan.chunk, self.options.vocab_start, chunk_start, size,
                *self.scalars, self.options.embed_scale,
            ),
            self.plan.score_grad,
            **self.flags,
            HAS_GRAD=self.has_grad,
            HAS_SLOPE=slope is not None,
            TIED=embed is None,
            NEED_SCORES=score_grad is not None,
            NEED_PROB=probs is not None,
            NEED_TEMPERATURE=temperature_part is not None,
            NEED_BIAS=bias_part is not None,
        )  # fmt: skip

    def _product(self, score_grad: Tensor, slots: Tensor, rows: slice, chunk_start: int, size: int) -> None:
        head, plan = self.inputs.head, self.plan
        blocks, count, width = plan.product.blocks, rows.stop - rows.start, head.shape[1]
        launch(
            two_pass.product_kernel,
            (cdiv(count, blocks["BLOCK_T"]) * cdiv(width, blocks["BLOCK_E"]), plan.splits),
            (
                score_grad, head, slots[:, rows], count, width,
                score_grad.stride(0), *head.stride(), slots.stride(0), chunk_start, size, plan.per_split,
            ),
            plan.product,
            FIRST=chunk_start == 0,
            **self.precision,
        )  # fmt: skip

    def _vocab_grad(
        self,
        product: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor] | None,
        sums: Tensor | None,
        out: Tensor,
        count: int,
        chunk_start: int,
        size: int,
        first: bool,
        last: bool,
    ) -> None:
        """out[chunk] = product[0].T @ product[1] (+ second), added up over blocks of rows in `sums`."""
        (a, b), (a2, b2) = product, second or (None, None)
        blocks = self.plan.vocab_grad.blocks
        launch(
            backward_kernels.vocab_grad_kernel,
            (cdiv(size, blocks["BLOCK_V"]) * cdiv(out.shape[1], blocks["BLOCK_E"]),),
            (
                a, b, a2, b2, sums, out,
                count, out.shape[1], a.stride(0), *b.stride(), *((0, 0) if b2 is None else b2.stride()), out.stride(0),
                chunk_start, size,
            ),
            self.plan.vocab_grad,
            FIRST=first,
            LAST=last,
            DUAL=second is not None,
            **self.precision,
        )  # fmt: skip
