"""The backward of `soft_embed`: walks chunks of the vocabulary and blocks of rows, scores recomputed or P kept."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import launching
from ..contract import Grads, Inputs, Needs, Options, Saved
from ..launching import device_of, score_flags, score_scalars, score_strides, score_tensors
from ..plan import Backward, Config, Device, cdiv, padded, plan_backward
from . import gradients as kernels


class _Upstream(NamedTuple):
    """Gradients that come in, of some rows; None: zero."""

    out: Tensor | None  # [T, E]
    entropy: Tensor | None  # [T]
    constant: Tensor  # [T], what `constants_kernel` makes of all of them

    def of_rows(self, rows: slice) -> _Upstream:
        return _Upstream(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


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

    `saved.peak` and `saved.total` may be those of a whole vocabulary of which `head` is one shard; `saved.probs` only
    without shards and soft-cap.
    """
    hidden, head, embed, bias, temperature = inputs[:5]
    values, num_rows = inputs.values, inputs.num_rows
    num_vocab = values.shape[0]
    needs = needs._replace(
        bias=needs.bias and bias is not None,
        embed=needs.embed and embed is not None,
        temperature=needs.temperature and temperature is not None,
        noise_scale=needs.noise_scale and inputs.noise_scale is not None,
    )
    need_values = (needs.embed if embed is not None else needs.head) and grad_out is not None
    need_scores = any(needs._replace(embed=False))
    runs = num_rows > 0 and (need_scores or need_values)
    zeros = functools.partial(torch.zeros, device=hidden.device)
    # Whatever runs writes every element.
    make = functools.partial(torch.empty, device=hidden.device) if runs else zeros
    grads = Grads(
        None if not needs.hidden
        else make((num_rows, num_vocab), dtype=hidden.dtype) if head is None
        else make((num_rows, head.shape[1]), dtype=torch.float32),
        make(head.shape, dtype=head.dtype) if needs.head and head is not None else None,
        (make if need_values else zeros)(values.shape, dtype=values.dtype) if needs.embed else None,
        make(num_vocab, dtype=torch.float32) if needs.bias else None,
        make(num_rows, dtype=torch.float32) if needs.temperature else None,
        make(num_rows, dtype=torch.float32) if needs.noise_scale else None,
    )  # fmt: skip
    if not runs:
        return grads
    grad_lse, grad_entropy, saved = side_by_side(grad_lse, grad_entropy, saved)
    if grad_entropy is not None or needs.temperature or needs.noise_scale or options.softcap is not None:
        saved = saved._replace(probs=None)  # these need the scores themselves
    plan = plan_backward(
        launching.problem_of(inputs),
        device or device_of(hidden.device),
        need_values,
        needs.head if head is not None else need_scores and not needs.hidden,
        exact_scores=launching.exact_scores(inputs, saved.entropy is not None),
    )
    constant = constants(grad_out, grad_lse, grad_entropy, saved)
    walk = _Walk(inputs, options, saved, plan, _Upstream(grad_out, grad_entropy, constant), needs, need_values)
    walk.run(grads)
    if grads.temperature is not None:
        grads.temperature.neg_()
    return grads


def side_by_side(
    grad_lse: Tensor | None, grad_entropy: Tensor | None, saved: Saved
) -> tuple[Tensor | None, Tensor | None, Saved]:
    """The same, contiguous: the kernels take a number of each row to lie beside the next row's, while the gradients of
    a sum have stride 0."""
    probs = saved.probs
    side = (None if tensor is None else tensor.contiguous() for tensor in saved._replace(probs=None))
    saved = Saved(*side)  # type: ignore[arg-type]
    return (
        None if grad_lse is None else grad_lse.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        saved._replace(probs=probs),
    )


def constants(grad_out: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None, saved: Saved) -> Tensor:
    """What is subtracted from dP in each row, [T]."""
    (num_rows, width), device = saved.out.shape, saved.out.device
    constant = torch.empty(num_rows, dtype=torch.float32, device=device)
    launching.launch(
        kernels.constants_kernel,
        (num_rows,),
        (
            saved.total, grad_out, grad_lse, grad_entropy, saved.out, saved.entropy, constant,
            width, *((0, 0) if grad_out is None else grad_out.stride()),
        ),
        Config({"BLOCK_E": min(1024, 1 << (width - 1).bit_length())}, 4, 1),
    )  # fmt: skip
    return constant


class _Walk:
    """The loop over chunks and blocks of rows, and the scratch of one of each.

    `outs` holds dS and, where it is wanted, P, [1 or 2, T, C]. `sums` holds the products h W^T and g E^T in float32,
    [2, T, C]; it is the same memory for float32 inputs. Where scores are rounded, as they were in the forward, they
    take the memory of dS, and `sums` holds g E^T alone. Given logits need no place, and dS is written into their
    gradient if that is wanted.
    """

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        saved: Saved,
        plan: Backward,
        upstream: _Upstream,
        needs: Needs,
        need_values: bool,
    ) -> None:
        self.inputs, self.options, self.saved, self.plan, self.upstream = inputs, options, saved, plan, upstream
        self.needs, self.need_values = needs, need_values
        self.need_scores = any(needs._replace(embed=False))
        hidden, dtype, given = inputs.hidden, inputs.values.dtype, inputs.head is None
        self.elements = size = plan.row_block * padded(min(plan.chunk, inputs.num_vocab))
        apart = dtype != torch.float32
        own = not (given and needs.hidden)  # a place for dS
        self.outs = torch.empty((own + (need_values if apart else 1)) * size, dtype=dtype, device=hidden.device)
        self.sums = self.outs
        if apart:
            products = 1 if given or plan.half_scores else 2
            self.sums = torch.empty(products * size, dtype=torch.float32, device=hidden.device)
        self.stacked: tuple[slice, Tensor] | None = None  # of the last block of rows
        self.ones = None
        if needs.bias:
            self.ones = torch.ones((plan.row_block, 1), dtype=dtype if own else hidden.dtype, device=hidden.device)

    def run(self, grads: Grads) -> None:
        num_rows, num_vocab = self.inputs.num_rows, self.inputs.num_vocab
        blocks, chunks = _slices(num_rows, self.plan.row_block), _slices(num_vocab, self.plan.chunk)
        head_sum = embed_sum = None
        if len(blocks) > 1:  # sums over the blocks of rows are rounded once
            head_sum, embed_sum = self._float32_sum(grads.head), self._float32_sum(grads.embed)
        # blocks of rows follow one another where they are summed, chunks where a block is otherwise cut out again
        steps = [(rows, vocab) for vocab in chunks for rows in blocks]
        if grads.head is None and grads.embed is None:
            steps = [(rows, vocab) for rows in blocks for vocab in chunks]
        for rows, vocab in steps:
            head, embed = _chunk(grads.head, head_sum, vocab), _chunk(grads.embed, embed_sum, vocab)
            part = Grads(
                None if grads.hidden is None else grads.hidden[rows],
                head,
                embed,
                None if grads.bias is None else grads.bias[vocab, None],
                None if grads.temperature is None else grads.temperature[rows],
                None if grads.noise_scale is None else grads.noise_scale[rows],
            )
            self._step(rows, vocab, part)
            if rows.stop == num_rows:
                for grad, total in ((grads.head, head), (grads.embed, embed)):
                    if grad is not None and total is not None and total.dtype != grad.dtype:
                        grad[vocab] = total

    def _float32_sum(self, grad: Tensor | None) -> Tensor | None:
        if grad is None or grad.dtype == torch.float32:
            return None
        return grad.new_empty((min(self.plan.chunk, grad.shape[0]), grad.shape[1]), dtype=torch.float32)

    def _step(self, rows: slice, vocab: slice, grads: Grads) -> None:
        """One block of rows and one chunk: `grads` are the parts of the results that it adds to or begins."""
        inputs, upstream, need_values = self.inputs.of_rows(rows), self.upstream.of_rows(rows), self.need_values
        hidden, head, embed = inputs[:3]
        count, size, grad_out = inputs.num_rows, vocab.stop - vocab.start, upstream.out
        elements = count * padded(size)
        sums, outs = (
            flat[: flat.shape[0] // self.elements * elements].view(-1, count, padded(size))[..., :size]
            for flat in (self.sums, self.outs)
        )
        probs = None if self.saved.probs is None else self.saved.probs[rows, vocab]
        grad_probs = sums[-1]
        products = hidden[..., vocab] if probs is None and head is None else probs
        at_once = products is None and not self.plan.half_scores
        both = None  # [2 T, D], where both products are with the same matrix
        if embed is None and grad_out is not None and (at_once or need_values):
            both = self._stack(rows, hidden, grad_out)
        if products is None and head is not None:
            products = (outs if self.plan.half_scores else sums)[0]
            if both is not None and at_once:
                launching.product(both, head[vocab].T, sums.flatten(0, 1))
            else:
                launching.product(hidden, head[vocab].T, products)
        if grad_out is not None and self.need_scores and not (both is not None and at_once):
            launching.product(grad_out, inputs.values[vocab].T, grad_probs)
        if head is None and grads.hidden is not None:
            score_grads: Tensor | None = grads.hidden[:, vocab]
        else:
            score_grads = outs[0] if self.need_scores else None
        assert products is not None
        out = score_grads, outs[-1] if need_values else None
        self._score_grad(inputs, upstream, rows, vocab, products, grad_probs, out, probs is not None, grads)
        first_rows, first_vocab = rows.start == 0, vocab.start == 0
        if grads.hidden is not None and head is not None:
            launching.product(outs[0], head[vocab], grads.hidden, add=not first_vocab)
        if grads.bias is not None and self.ones is not None and score_grads is not None:
            launching.product(score_grads.T, self.ones[:count], grads.bias, add=not first_rows)
        if grads.head is not None:
            if both is not None:
                launching.product(outs.flatten(0, 1).T, both, grads.head, add=not first_rows)
            else:
                launching.product(outs[0].T, hidden, grads.head, add=not first_rows)
        if grads.embed is not None and grad_out is not None:
            launching.product(outs[-1].T, grad_out, grads.embed, add=not first_rows)

    def _stack(self, rows: slice, hidden: Tensor, grad_out: Tensor) -> Tensor:
        if self.stacked is None or self.stacked[0] != rows:
            self.stacked = rows, torch.cat([hidden, grad_out])
        return self.stacked[1]

    def _score_grad(
        self,
        inputs: Inputs,
        upstream: _Upstream,
        rows: slice,
        vocab: slice,
        products: Tensor,
        grad_probs: Tensor,
        out: tuple[Tensor | None, Tensor | None],  # dS, P
        kept: bool,
        grads: Grads,
    ) -> None:
        count, size, config = inputs.num_rows, vocab.stop - vocab.start, self.plan.score_grad
        token = None if self.saved.token is None or out[1] is None else self.saved.token[rows]
        tiles = cdiv(size, config.blocks["BLOCK_V"])
        sums = grads.temperature, grads.noise_scale  # of each row, over the vocabulary
        parts = [None if grad is None else grad.new_empty((count, tiles)) for grad in sums]
        launching.launch(
            kernels.score_grad_kernel,
            (cdiv(count, config.blocks["BLOCK_T"]) * tiles,),
            (
                products, None if upstream.out is None or not self.need_scores else grad_probs,
                *out, *parts, None if kept else launching.logit_offsets(inputs), token,
                *score_tensors(inputs),
                self.saved.peak[rows], self.saved.total[rows], upstream.constant, upstream.entropy,
                count, inputs.num_vocab, launching.row_stride(products), products.stride(-1), grad_probs.stride(0),
                *(0 if tensor is None else tensor.stride(0) for tensor in out), *score_strides(inputs),
                self.options.vocab_start, vocab.start, size, *score_scalars(inputs, self.options),
                self.options.embed_scale,
            ),
            config,
            ALIGNED=score_flags(inputs, self.options)["ALIGNED"],
            KEPT=kept,
        )  # fmt: skip
        for grad, part in zip(sums, parts, strict=True):
            if grad is not None and part is not None:
                if vocab.start == 0:
                    torch.sum(part, 1, out=grad)
                else:
                    grad += part.sum(1)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _chunk(grad: Tensor | None, total: Tensor | None, vocab: slice) -> Tensor | None:
    """Where the gradient of a chunk is summed: in its place, or in float32."""
    if grad is None or total is None:
        return None if grad is None else grad[vocab]
    return total[: vocab.stop - vocab.start]
