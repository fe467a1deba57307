"""The torch backend of ``soft_embed``: a chunked online softmax over the vocabulary, and its recomputing backward.

What is in memory, for T rows, V vocabulary entries, hidden size D, embedding size E::

    whole run   hidden [T, D], acc [T, E], running max and sum [T]            (state, accumulation dtype)
    one chunk   C rows of the head (and embedding) matrix, copied if half or with gaps    [C, D] ([C, E])
    one tile    scores of R rows against the chunk, in two to four buffers    [R, C]

The outer loop walks the vocabulary, so that each matrix is read once (a tied one is still in cache for the second
product); the inner loop walks row tiles, so that chunk and tile together stay inside ``WORKSPACE_BYTES`` whatever T
is. Nothing of size [T, V] exists, forward or backward. Half-precision inputs are computed in float32, float64 in
float64.

The three functions ``scan``, ``forward`` and ``backward`` are pure (no autograd, no mutation of their arguments): they
are the seam that every backend offers and to which ``soft_embed_op`` attaches autograd. ``scan`` is the part of the
forward that a vocabulary shard runs; its ``OnlineState`` is what shards merge before ``finish``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gircse_kernels.contract import Forward, Grads, Inputs, Needs, Options, Saved
from torch import Tensor

from .scorer import Scorer, row_factor
from .straight_through import one_hot_rows
from .tiles_torch import ChunkReader, is_copied, matmul_nt, slices, tiling

# Below this, exp is exactly 0 in every dtype. A finite stand-in for -inf, whose product with that 0 would be NaN.
LOG_FLOOR = -1e4


class OnlineState(NamedTuple):
    """Running softmax over the vocabulary rows seen so far, relative to ``peak``. Mergeable across shards."""

    peak: Tensor  # [T, 1] largest score, never below the smallest finite number
    total: Tensor  # [T, 1] sum of exp(score - peak)
    acc: Tensor  # [T, E] sum of exp(score - peak) * embedding row
    moment: Tensor | None  # [T, 1] sum of exp(score - peak) * (score - peak), for the entropy
    argmax: Tensor | None  # [T, 1] vocabulary index of the peak, the lowest one of a tie


class Matrices:
    """Chunks of the head [C, D], None where logits are given, and of the embedding matrix [C, E]."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype, size: int) -> None:
        self.head, self.embed = (None if m is None else ChunkReader(m, dtype, size) for m in inputs[1:3])

    def __call__(self, vocab: slice) -> tuple[Tensor | None, Tensor]:
        head, embed = (None if read is None else read(vocab) for read in (self.head, self.embed))
        values = head if embed is None else embed
        assert values is not None
        return head, values

    @staticmethod
    def copied(inputs: Inputs, dtype: torch.dtype) -> int:
        """Elements that are copied for each vocabulary entry of a chunk."""
        return sum(m.shape[1] for m in inputs[1:3] if m is not None and is_copied(m, dtype))


def forward(inputs: Inputs, options: Options, *, stats: bool, exact: bool, keep: bool = False) -> Forward:
    """Soft tokens, with ``stats`` their statistics, with ``exact`` also before rounding. ``keep`` is for other
    backends: this one recomputes its probabilities."""
    return finish(scan(inputs, options, stats=stats), options, inputs.out_dtype, exact=exact)


def scan(inputs: Inputs, options: Options, *, stats: bool) -> OnlineState:
    """One pass over the vocabulary (or over one shard of it)."""
    scorer = Scorer(inputs, options)
    num_rows, width, dtype, device = inputs.num_rows, inputs.values.shape[1], scorer.dtype, inputs.hidden.device
    state = OnlineState(
        # A finite start instead of -inf: a chunk whose scores are all -inf then gives exp(-inf) = 0, not NaN.
        peak=torch.full((num_rows, 1), torch.finfo(dtype).min, dtype=dtype, device=device),
        total=torch.zeros((num_rows, 1), dtype=dtype, device=device),
        acc=torch.zeros((num_rows, width), dtype=dtype, device=device),
        moment=torch.zeros((num_rows, 1), dtype=dtype, device=device) if stats else None,
        argmax=torch.zeros((num_rows, 1), dtype=torch.int64, device=device) if stats else None,
    )
    tile, size = tiling(
        num_rows,
        inputs.num_vocab,
        tiles=1 + (options.softcap is not None) + stats + _masks(inputs),
        per_vocab=Matrices.copied(inputs, dtype),
        per_row=width,
        itemsize=dtype.itemsize,
    )
    read = Matrices(inputs, dtype, size)
    for vocab in slices(inputs.num_vocab, size):
        chunk, chunk_values = read(vocab)
        for rows in slices(num_rows, tile):
            scores, _ = scorer(rows, vocab, chunk)
            _accumulate(state, scores, chunk_values, rows, vocab.start)
    return state


def _accumulate(state: OnlineState, scores: Tensor, values: Tensor, rows: slice, offset: int) -> None:
    """Merge one tile of scores [R, C] with its value rows [C, E] into the running softmax, in place."""
    peak, total, acc = state.peak[rows], state.total[rows], state.acc[rows]
    if state.argmax is None:
        highest = scores.amax(1, keepdim=True)
    else:
        highest, index = scores.max(1, keepdim=True)
        argmax = state.argmax[rows]
        torch.where(highest > peak, index + offset, argmax, out=argmax)
    new_peak = torch.maximum(peak, highest)
    shift = peak - new_peak
    decay = shift.exp()
    scores.sub_(new_peak)
    if state.moment is None:
        weights = scores.exp_()
    else:
        weights = scores.exp()
        # The moment moves with the peak: sum e^(x + shift) * (x + shift).
        moment = state.moment[rows]
        moment.add_(shift.clamp_min_(LOG_FLOOR) * total).mul_(decay)
        moment.add_(scores.clamp_min_(LOG_FLOOR).mul_(weights).sum(1, keepdim=True))
    total.mul_(decay).add_(weights.sum(1, keepdim=True))
    acc.mul_(decay).add_(matmul_nt(weights, values.T))
    peak.copy_(new_peak)


def finish(state: OnlineState, options: Options, dtype: torch.dtype, *, exact: bool) -> Forward:
    """Normalise the running softmax; ``out`` in dtype. Consumes ``state.acc``."""
    peak, total, acc, moment, argmax = state
    out = acc.div_(total)
    if options.embed_scale != 1.0:
        out.mul_(options.embed_scale)
    log_total = total.log()
    peak, total, log_total = peak[:, 0], total[:, 0], log_total[:, 0]
    lse = peak + log_total
    # Whoever called may change the result in place; what backward reads must stay.
    rounded = out.to(dtype, copy=exact)
    kept = out if exact else None
    if moment is None or argmax is None:
        return Forward(rounded, kept, lse, None, None, None, peak, total)
    # H = lse - E[s] = log(total) - E[s - peak]; the peak's own weight is exp(0), so max_prob = 1 / total.
    entropy = log_total - moment[:, 0] / total
    return Forward(rounded, kept, lse, entropy, total.reciprocal(), argmax[:, 0], peak, total)


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Grads:
    """Gradients from ``grad_out`` [T, E], ``grad_lse`` [T], ``grad_entropy`` [T] (None: zero); scores are recomputed
    by chunk.

    With P the probabilities, H their entropy and dP = embed_scale * grad_out @ embed.T, the gradient of the scores is
    ``dS = P * (dP - sum(grad_out * out) + grad_lse) - grad_entropy * P * (log P + H)``.
    """
    hidden, head, embed, bias = inputs[:4]
    peak, total = saved.peak[:, None], saved.total[:, None]
    scorer = Scorer(inputs, options)
    num_rows, num_vocab, dtype, device = inputs.num_rows, inputs.num_vocab, scorer.dtype, hidden.device
    upstream, constant, slope = upstream_of(grad_out, grad_lse, grad_entropy, saved, options, dtype)
    need_values = needs.embed if embed is not None else needs.head
    need_scores = any(needs._replace(embed=False))
    keep_log = slope is not None or needs.temperature
    grad_rows = None
    if needs.hidden and head is None:  # given logits: each of its elements is written once
        grad_rows = torch.empty((num_rows, num_vocab), dtype=hidden.dtype, device=device)
    elif needs.hidden:
        grad_rows = torch.zeros((num_rows, hidden.shape[1]), dtype=dtype, device=device)
    grad_head, grad_embed = (
        torch.empty_like(matrix, memory_format=torch.contiguous_format) if matrix is not None and need else None
        for matrix, need in ((head, needs.head), (embed, needs.embed))
    )
    grad_bias = torch.zeros(num_vocab, dtype=dtype, device=device) if bias is not None and needs.bias else None
    grad_temperature = torch.zeros((num_rows, 1), dtype=dtype, device=device) if needs.temperature else None
    grad_noise = torch.zeros((num_rows, 1), dtype=dtype, device=device) if needs.noise_scale else None
    grad_values = None
    if needs.bias_values and inputs.bias_values is not None:
        grad_values = torch.zeros_like(inputs.bias_values, dtype=dtype)

    width = 0 if head is None else head.shape[1]
    hard = saved.token is not None and need_values
    tile, size = tiling(
        num_rows,
        num_vocab,
        tiles=2
        + keep_log
        + 2 * (options.softcap is not None)
        + 2 * (needs.head or need_values)
        + 2 * hard
        + _masks(inputs),
        per_vocab=Matrices.copied(inputs, dtype)
        + (2 * width if needs.head else 0)
        + (2 * inputs.values.shape[1] if need_values else 0),
        per_row=width,
        itemsize=dtype.itemsize,
    )
    read = Matrices(inputs, dtype, size)
    for vocab in slices(num_vocab, size):
        chunk, chunk_values = read(vocab)
        chunk_grad_head: Tensor | None = None
        chunk_grad_embed: Tensor | None = None
        for rows in slices(num_rows, tile):
            scores, tanh = scorer(rows, vocab, chunk)
            scores.sub_(peak[rows])
            logs = scores.clamp_min(LOG_FLOOR) if keep_log else None
            weights = scores.exp_()
            if need_values:
                taken = weights
                if saved.token is not None:
                    taken = one_hot_rows(weights, total[rows], saved.token[rows], options.vocab_start + vocab.start)
                part = matmul_nt(taken.T, upstream[rows].T)
                if embed is None:
                    chunk_grad_head = _add(chunk_grad_head, part)
                else:
                    chunk_grad_embed = _add(chunk_grad_embed, part)
            if not need_scores:
                continue
            grad = matmul_nt(upstream[rows], chunk_values).sub_(constant[rows])
            if slope is not None and logs is not None:
                grad.addcmul_(logs, slope[rows], value=-1.0)
            grad.mul_(weights)
            if grad_temperature is not None and logs is not None:
                grad_temperature[rows] -= logs.mul_(grad).sum(1, keepdim=True)
            if scorer.seeds is not None and (grad_temperature is not None or grad_noise is not None):
                noise_sum = scorer.noise_gradient(grad, rows, vocab)
                if grad_temperature is not None:  # of the scores without noise
                    grad_temperature[rows] += noise_sum * row_factor(scorer.noise_scale, rows)
                if grad_noise is not None:
                    grad_noise[rows] += noise_sum
            if grad_values is not None:
                grad_values[rows] += scorer.entry_gradient(grad, rows, vocab)
            grad = scorer.backpropagate(grad, tanh, rows)
            if grad_bias is not None:
                grad_bias[vocab] += _bias_gradient(grad, scorer.inner, rows)
            if grad_rows is not None and chunk is None:
                grad_rows[rows, vocab] = grad.mul_(row_factor(scorer.inner, rows)) if scorer.scaled else grad
            elif grad_rows is not None and chunk is not None:
                grad_rows[rows] += matmul_nt(grad, chunk.T)
            if grad_head is not None:
                chunk_grad_head = _add(chunk_grad_head, matmul_nt(grad.T, scorer.rows[rows].T))
        if grad_head is not None and chunk_grad_head is not None:
            grad_head[vocab] = chunk_grad_head
        if grad_embed is not None and chunk_grad_embed is not None:
            grad_embed[vocab] = chunk_grad_embed
    if num_rows == 0:  # the chunk gradients were never made
        for matrix in (grad_head, grad_embed):
            if matrix is not None:
                matrix.zero_()
    if grad_rows is not None and head is not None and scorer.scaled:
        grad_rows.mul_(scorer.inner)
    temperature, noise_scale = (None if grad is None else grad[:, 0] for grad in (grad_temperature, grad_noise))
    return Grads(grad_rows, grad_head, grad_embed, grad_bias, temperature, noise_scale, grad_values)


def upstream_of(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    saved: Saved,
    options: Options,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is constant along a row in the gradient of its scores.

    With w = exp(score - peak), P = w / total: 1 / total and the constants go into the upstream gradient [T, E] and one
    number per row, so that ``dS = w * (upstream @ embed.T - constant - slope * (score - peak))``.
    """
    out, total = saved.out.to(dtype), saved.total[:, None]
    upstream = torch.zeros_like(out) if grad_out is None else grad_out.to(dtype)
    constant = (upstream * out).sum(1, keepdim=True)
    if grad_lse is not None:
        constant -= grad_lse.to(dtype)[:, None]
    slope = None
    if grad_entropy is not None and saved.entropy is not None:
        slope = grad_entropy.to(dtype)[:, None] / total
        constant += grad_entropy.to(dtype)[:, None] * (saved.entropy[:, None] - total.log())
    return (upstream * (options.embed_scale / total)).contiguous(), constant / total, slope


def _masks(inputs: Inputs) -> int:
    """Buffers of a tile that given logits and what removes entries take."""
    return (inputs.head is None) + (inputs.threshold is not None) + 2 * (inputs.bitmask is not None)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _bias_gradient(grad: Tensor, inner: float | Tensor, rows: slice) -> Tensor:
    """The bias enters each row's scaled logits with that row's factor ``inner``."""
    if isinstance(inner, Tensor):
        return grad.T @ inner[rows, 0]
    return grad.sum(0).mul_(inner)
