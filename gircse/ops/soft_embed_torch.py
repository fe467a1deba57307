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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from gircse_kernels.contract import Forward, Grads, Inputs, Needs, Options, Saved
from torch import Tensor

from .noise import gumbel
from .straight_through import one_hot_rows
from .tiles_torch import ChunkReader, accumulation_dtype, is_copied, matmul_nt, slices, tiling

# Below this, exp is exactly 0 in every dtype. A finite stand-in for -inf, whose product with that 0 would be NaN.
LOG_FLOOR = -1e4


class OnlineState(NamedTuple):
    """Running softmax over the vocabulary rows seen so far, relative to ``peak``. Mergeable across shards."""

    peak: Tensor  # [T, 1] largest score, never below the smallest finite number
    total: Tensor  # [T, 1] sum of exp(score - peak)
    acc: Tensor  # [T, E] sum of exp(score - peak) * embedding row
    moment: Tensor | None  # [T, 1] sum of exp(score - peak) * (score - peak), for the entropy
    argmax: Tensor | None  # [T, 1] vocabulary index of the peak, the lowest one of a tie


class Scorer:
    """Scores of a row tile against a vocabulary chunk, as `Options` defines them.

    All that is constant along a row is folded into one scaled copy of hidden (``inner``) and one factor after the
    soft-cap (``outer``), so that the plain case costs no pass over the scores.
    """

    def __init__(self, inputs: Inputs, options: Options) -> None:
        hidden = inputs.hidden
        self.inputs, self.dtype = inputs, accumulation_dtype(hidden.dtype)
        self.capped, self.vocab_start = options.softcap is not None, options.vocab_start
        inner: float | Tensor = options.logit_scale
        outer: float | Tensor = 1.0 / options.temperature
        if inputs.temperature is not None:
            outer = outer / inputs.temperature.to(self.dtype)[:, None]
        self.inverse_temperature = outer
        noise_scale = inputs.noise_scale
        self.noise_scale = options.noise_scale if noise_scale is None else noise_scale.to(self.dtype)[:, None]
        self.seeds = inputs.seeds
        if options.seed is not None:  # the same noise in every row
            self.seeds = torch.tensor([options.seed], device=hidden.device)
        if options.softcap is not None:
            inner, outer = inner / options.softcap, outer * options.softcap
        else:
            inner, outer = outer * inner, 1.0
        self.inner, self.outer = inner, outer  # numbers, or [T, 1]
        self.scaled = not isinstance(inner, float) or inner != 1.0
        self.rows = hidden[:0]
        if inputs.head is not None:
            rows = hidden.to(self.dtype)
            self.rows = (rows * inner if self.scaled else rows).contiguous()  # [T, D]

    def _products(self, rows: slice, vocab: slice, chunk: Tensor | None) -> Tensor:
        """Logits times `inner`, without bias, [R, C]: of a chunk of the head, or as they are given."""
        if chunk is not None:
            return matmul_nt(self.rows[rows], chunk)
        logits = self.inputs.logits(rows, vocab).to(self.dtype, copy=True)
        return logits.mul_(row_factor(self.inner, rows)) if self.scaled else logits

    def __call__(self, rows: slice, vocab: slice, chunk: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores [R, C], which the caller may overwrite, and tanh of the capped logits (None without soft-cap).

        ``chunk`` is that of the head, [C, D]; None: logits are given.
        """
        scores = self._products(rows, vocab, chunk)
        if self.inputs.bias is not None:
            bias = self.inputs.bias[vocab].to(self.dtype)
            if isinstance(self.inner, Tensor):
                scores.addr_(self.inner[rows, 0], bias)
            else:
                scores.add_(bias, alpha=self.inner)
        tanh = None
        if self.capped:
            tanh = scores.tanh_()
            scores = tanh * row_factor(self.outer, rows)
        if self.inputs.bias_ids is not None:
            add_entries(scores, *self._entries(rows, vocab))
        if self.inputs.bitmask is not None:
            scores.masked_fill_(~unpack_bits(self.inputs.bitmask[rows], *self._whole(vocab)), -torch.inf)
        threshold = self.inputs.threshold
        removed = None if threshold is None else scores < threshold[rows, None]  # whatever the noise
        if self.seeds is not None:
            factor = row_factor(self.noise_scale, rows)
            for part, noise in self.noise(rows, vocab):
                scores[:, part] += noise * factor
        if removed is not None:
            scores = scores.masked_fill_(removed, -torch.inf)
        return scores, tanh

    def noise(self, rows: slice, vocab: slice) -> Iterator[tuple[slice, Tensor]]:
        """Standard Gumbel noise, a few columns at a time, because the generator has a dozen temporaries."""
        assert self.seeds is not None
        seeds = self.seeds if self.seeds.shape[0] == 1 else self.seeds[rows]
        start = self._whole(vocab)[0]
        for part in slices(vocab.stop - vocab.start, max(4, (1 << 16) // max(1, seeds.shape[0]))):
            yield part, gumbel(seeds, start + part.start, start + part.stop).to(self.dtype)

    def _whole(self, vocab: slice) -> tuple[int, int]:
        """First and last + 1 in the whole vocabulary."""
        return self.vocab_start + vocab.start, self.vocab_start + vocab.stop

    def _entries(self, rows: slice, vocab: slice) -> tuple[Tensor, Tensor]:
        """Columns and values [R, m] of what `bias_ids` add to the scores of a chunk."""
        assert self.inputs.bias_values is not None
        columns, inside = self._columns(rows, vocab)
        values = self.inputs.bias_values[rows].to(self.dtype) * row_factor(self.inverse_temperature, rows)
        return columns, values.masked_fill(~inside, 0.0)

    def _columns(self, rows: slice, vocab: slice) -> tuple[Tensor, Tensor]:
        """Columns [R, m] of `bias_ids` in a chunk, and which of them are in it."""
        assert self.inputs.bias_ids is not None
        start, stop = self._whole(vocab)
        columns = self.inputs.bias_ids[rows] - start
        inside = (columns >= 0) & (columns < stop - start)
        return columns.masked_fill(~inside, 0), inside

    def backpropagate(self, grad: Tensor, tanh: Tensor | None, rows: slice) -> Tensor:
        """Gradient of the products times `inner` from the gradient of the scores, in place."""
        if tanh is None:
            return grad
        # d(outer * tanh(x)) = outer * (1 - tanh^2) dx
        grad.addcmul_(grad * tanh, tanh, value=-1.0)
        return grad.mul_(row_factor(self.outer, rows))

    def entry_gradient(self, grad: Tensor, rows: slice, vocab: slice) -> Tensor:
        """A chunk's part of the gradient of `bias_values` [R, m], from the gradient of its scores."""
        columns, inside = self._columns(rows, vocab)
        return grad.gather(1, columns).masked_fill_(~inside, 0.0) * row_factor(self.inverse_temperature, rows)

    def noise_gradient(self, grad: Tensor, rows: slice, vocab: slice) -> Tensor:
        """A chunk's sum of dS gumbel [R, 1], from the gradient of its scores."""
        return sum((grad[:, part] * noise).sum(1, keepdim=True) for part, noise in self.noise(rows, vocab))  # type: ignore[return-value]


def add_entries(scores: Tensor, columns: Tensor, values: Tensor) -> None:
    """``scores[r, columns[r, j]] += values[r, j]``, in place, in a fixed order where columns occur twice."""
    if scores.device.type == "cpu":
        scores.scatter_add_(1, columns, values)
    else:  # sorts, where a scatter on CUDA would add atomically
        row = torch.arange(scores.shape[0], device=scores.device)[:, None]
        scores.index_put_((row.expand_as(columns), columns), values, accumulate=True)


def unpack_bits(bitmask: Tensor, start: int, stop: int) -> Tensor:
    """Bits start to stop - 1 of packed rows [R, W] int32, as bool [R, stop - start]; see `Inputs.bitmask`."""
    words = bitmask[:, start // 32 : -(-stop // 32)]
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return (bits & 1).bool().flatten(1)[:, start % 32 :][:, : stop - start]


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


def row_factor(factor: float | Tensor, rows: slice) -> float | Tensor:
    """The part of a per-row factor that belongs to a tile; a number as it is."""
    return factor[rows] if isinstance(factor, Tensor) else factor


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
