"""The backward of `soft_embed`: walks chunks of the vocabulary and blocks of rows, scores recomputed or P kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import launching
from ..contract import Grads, Inputs, Needs, Options, Saved
from ..launching import Scoring, chunks, device_of
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


class _Room(NamedTuple):
    """The scratch of one block of rows and one chunk, [.., T, C] each."""

    sums: Tensor
    outs: Tensor
    products: Tensor  # of `sums`, or of `outs` where scores are rounded
    grad_probs: Tensor
    score_grads: Tensor
    probs: Tensor


class _Block:
    """A block of rows: its parts of everything, cut out once for all chunks; `chunks` makes those of the chunks."""

    def __init__(
        self, rows: slice, inputs: Inputs, options: Options, saved: Saved, upstream: _Upstream, grads: Grads, chunk: int
    ) -> None:
        if rows.stop - rows.start < inputs.num_rows:
            inputs, upstream = inputs.of_rows(rows), upstream.of_rows(rows)
            saved = Saved(*(None if tensor is None else tensor[rows] for tensor in saved))  # type: ignore[arg-type]
            of_rows = (grads.hidden, grads.temperature, grads.noise_scale)
            hidden, temperature, noise_scale = (None if grad is None else grad[rows] for grad in of_rows)
            grads = grads._replace(hidden=hidden, temperature=temperature, noise_scale=noise_scale)
        self.rows, self.inputs, self.saved, self.upstream, self.grads = rows, inputs, saved, upstream, grads
        self.count, self.scoring = inputs.num_rows, Scoring.of(inputs, options)
        self.products: Sequence[Tensor] | None = None
        if saved.probs is not None:
            self.products = chunks(saved.probs, chunk, 1)
        elif inputs.head is None:
            self.products = chunks(inputs.hidden, chunk, inputs.hidden.dim() - 1)
        self.score_grads: Sequence[Tensor] | None = None
        if inputs.head is None and grads.hidden is not None:
            self.score_grads = chunks(grads.hidden, chunk, 1)


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
        self.need_values, self.need_scores = need_values, any(needs._replace(embed=False))
        hidden, head, dtype, given = inputs.hidden, inputs.head, inputs.values.dtype, inputs.head is None
        self.elements = size = plan.row_block * padded(min(plan.chunk, inputs.num_vocab))
        apart = dtype != torch.float32
        own = not (given and needs.hidden)  # a place for dS
        self.outs = torch.empty((own + (need_values if apart else 1)) * size, dtype=dtype, device=hidden.device)
        self.sums = self.outs
        if apart:
            products = 1 if given or plan.half_scores else 2
            self.sums = torch.empty(products * size, dtype=torch.float32, device=hidden.device)
        self.rooms: dict[tuple[int, int], _Room] = {}
        # of the matrices, for h W^T, dS W and g E^T
        self.heads = None if head is None else chunks(head, plan.chunk)
        self.head_columns = None if head is None else chunks(head.T, plan.chunk, 1)
        tied = inputs.embed is None
        self.value_columns = self.head_columns if tied else chunks(inputs.values.T, plan.chunk, 1)
        self.stacked: tuple[_Block, Tensor] | None = None  # of the last block of rows
        self.ones = None
        if needs.bias:
            self.ones = torch.ones((plan.row_block, 1), dtype=dtype if own else hidden.dtype, device=hidden.device)

    def run(self, grads: Grads) -> None:
        num_rows, plan = self.inputs.num_rows, self.plan
        blocks = [
            _Block(rows, self.inputs, self.options, self.saved, self.upstream, grads, plan.chunk)
            for rows in _slices(num_rows, plan.row_block)
        ]
        parts = list(enumerate(_slices(self.inputs.num_vocab, plan.chunk)))
        head_sum = embed_sum = None
        if len(blocks) > 1:  # sums over the blocks of rows are rounded once
            head_sum, embed_sum = self._float32_sum(grads.head), self._float32_sum(grads.embed)
        # blocks of rows follow one another where they are summed, chunks where a block is otherwise cut out again
        steps = [(block, part) for part in parts for block in blocks]
        if grads.head is None and grads.embed is None:
            steps = [(block, part) for block in blocks for part in parts]
        for block, (i, vocab) in steps:
            head, embed = _chunk(grads.head, head_sum, vocab), _chunk(grads.embed, embed_sum, vocab)
            bias = None if grads.bias is None else grads.bias[vocab, None]
            self._step(block, i, vocab, block.grads._replace(head=head, embed=embed, bias=bias))
            if block.rows.stop == num_rows:
                for grad, total in ((grads.head, head), (grads.embed, embed)):
                    if grad is not None and total is not None and total.dtype != grad.dtype:
                        grad[vocab] = total

    def _float32_sum(self, grad: Tensor | None) -> Tensor | None:
        if grad is None or grad.dtype == torch.float32:
            return None
        return grad.new_empty((min(self.plan.chunk, grad.shape[0]), grad.shape[1]), dtype=torch.float32)

    def _room(self, count: int, size: int) -> _Room:
        """Nearly all chunks are alike."""
        room = self.rooms.get((count, size))
        if room is None:
            elements = count * padded(size)
            sums, outs = (
                flat[: flat.shape[0] // self.elements * elements].view(-1, count, padded(size))[..., :size]
                for flat in (self.sums, self.outs)
            )
            products = outs if self.plan.half_scores else sums
            first, last = (0, -1) if len(outs) else (slice(0), slice(0))
            room = _Room(sums, outs, products[first], sums[-1], outs[first], outs[last])
            self.rooms[count, size] = room
        return room

    def _step(self, block: _Block, i: int, vocab: slice, grads: Grads) -> None:
        """One block of rows and one chunk: `grads` are the parts of the results that it adds to or begins."""
        inputs, grad_out, need_values = block.inputs, block.upstream.out, self.need_values
        hidden, embed = inputs.hidden, inputs.embed
        room = self._room(block.count, vocab.stop - vocab.start)
        products = None if block.products is None else block.products[i]
        at_once = products is None and not self.plan.half_scores
        both = None  # [2 T, D], where both products are with the same matrix
        if embed is None and grad_out is not None and (at_once or need_values):
            both = self._stack(block, hidden, grad_out)
        if products is None and self.head_columns is not None:
            products = room.products
            if both is not None and at_once:
                launching.product(both, self.head_columns[i], room.sums.flatten(0, 1))
            else:
                launching.product(hidden, self.head_columns[i], products)
        if grad_out is not None and self.need_scores and not (both is not None and at_once):
            assert self.value_columns is not None
            launching.product(grad_out, self.value_columns[i], room.grad_probs)
        score_grads = None
        if self.need_scores:
            score_grads = room.score_grads if block.score_grads is None else block.score_grads[i]
        assert products is not None
        self._score_grad(block, vocab, products, room, score_grads, grads)
        first_rows, first_vocab = block.rows.start == 0, i == 0
        if grads.hidden is not None and self.heads is not None:
            launching.product(room.score_grads, self.heads[i], grads.hidden, add=not first_vocab)
        if grads.bias is not None and self.ones is not None and score_grads is not None:
            launching.product(score_grads.T, self.ones[: block.count], grads.bias, add=not first_rows)
        if grads.head is not None:
            if both is not None:
                launching.product(room.outs.flatten(0, 1).T, both, grads.head, add=not first_rows)
            else:
                launching.product(room.score_grads.T, hidden, grads.head, add=not first_rows)
        if grads.embed is not None and grad_out is not None:
            launching.product(room.probs.T, grad_out, grads.embed, add=not first_rows)

    def _stack(self, block: _Block, hidden: Tensor, grad_out: Tensor) -> Tensor:
        if self.stacked is None or self.stacked[0] is not block:
            self.stacked = block, torch.cat([hidden, grad_out])
        return self.stacked[1]

    def _score_grad(
        self, block: _Block, vocab: slice, products: Tensor, room: _Room, score_grads: Tensor | None, grads: Grads
    ) -> None:
        count, size, config = block.count, vocab.stop - vocab.start, self.plan.score_grad
        saved, upstream, start = block.saved, block.upstream, self.options.vocab_start
        offsets, tensors, strides, scalars = block.scoring
        kept = saved.probs is not None
        probs = room.probs if self.need_values else None
        tiles = cdiv(size, config.blocks["BLOCK_V"])
        sums = grads.temperature, grads.noise_scale  # of each row, over the vocabulary
        parts = [None if grad is None else grad.new_empty((count, tiles)) for grad in sums]
        launching.launch(
            kernels.score_grad_kernel,
            (cdiv(count, config.blocks["BLOCK_T"]) * tiles,),
            (
                products, None if upstream.out is None or not self.need_scores else room.grad_probs,
                score_grads, probs, *parts, None if kept else offsets, None if probs is None else saved.token,
                *tensors, saved.peak, saved.total, upstream.constant, upstream.entropy,
                count, self.inputs.num_vocab, launching.row_stride(products), products.stride(-1),
                room.grad_probs.stride(0), 0 if score_grads is None else score_grads.stride(0),
                0 if probs is None else probs.stride(0), *strides, start, vocab.start, size, *scalars,
                self.options.embed_scale,
            ),
            config,
            ALIGNED=start % 4 == 0,
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
