"""The backward of `soft_embed`: walks chunks of the vocabulary and blocks of rows, scores recomputed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import backward as kernels
from . import launching, matmul
from .contract import Grads, Inputs, Needs, Options, Saved
from .launching import bias_stride, device_of, score_flags, score_scalars
from .plan import Backward, Config, Device, Problem, cdiv, plan_backward


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
    hidden, head, embed, bias, temperature = inputs[:5]
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
        launching.launch(
            kernels.constants_kernel,
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
        self.flags, self.scalars = score_flags(inputs, options), score_scalars(inputs, options)
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
        hidden, head, embed, bias, temperature, seeds, threshold = self.inputs
        values = head if embed is None else embed
        blocks, count = self.plan.score_grad.blocks, rows.stop - rows.start
        block, grad_block = hidden[rows], self.grad_out[rows]
        slope = self.grad_entropy
        launching.launch(
            kernels.score_grad_kernel,
            (cdiv(count, blocks["BLOCK_T"]) * cdiv(size, blocks["BLOCK_V"]),),
            (
                block, head, grad_block, values, bias,
                *(None if tensor is None else tensor[rows] for tensor in (temperature, seeds, threshold)),
                self.saved.peak[rows], self.saved.total[rows], self.constant[rows],
                None if slope is None else slope[rows],
                score_grad, probs, temperature_part, bias_part,
                count, head.shape[0], head.shape[1], values.shape[1],
                *block.stride(), *head.stride(), *grad_block.stride(), *values.stride(), bias_stride(self.inputs),
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
        launching.launch(
            matmul.product_kernel,
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
        launching.launch(
            matmul.vocab_grad_kernel,
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
