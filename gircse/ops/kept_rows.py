"""The torch backend of ``soft_embed`` where a truncation leaves few entries: products over those rows alone.

`gircse.ops.selection` has found the C entries of each row that may be kept and their scores (`Inputs.ids`,
`Inputs.scores`). The softmax runs over [T, C], and what is read of the matrices, forward and backward, are the rows
that are kept. The functions are those of `soft_embed_torch`, whose formulas they share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gircse_kernels.contract import Forward, Grads, Inputs, Needs, Options, Saved
from torch import Tensor

from .noise import gumbel_at
from .scorer import Scorer
from .soft_embed_torch import LOG_FLOOR, OnlineState, finish, upstream_of
from .tiles_torch import accumulation_dtype, slices

# Bytes of the rows that a product gathers at a time: they stay in a cache, in one buffer (see `ChunkReader`).
_GATHERED_BYTES = 4 << 20
_ALL = slice(None)


def fits(inputs: Inputs) -> bool:
    """Whether every row keeps fewer entries than there are candidates. Reads values, on the CPU."""
    ids, num_kept = inputs.ids, inputs.num_kept
    if ids is None or num_kept is None or not inputs.num_vocab:
        return False
    return not bool((num_kept >= ids.shape[1]).any())


def forward(inputs: Inputs, options: Options, *, stats: bool, exact: bool, keep: bool = False) -> Forward:
    """As ``soft_embed_torch.forward``."""
    return finish(scan(inputs, options, stats=stats), options, inputs.out_dtype, exact=exact)


def scan(inputs: Inputs, options: Options, *, stats: bool) -> OnlineState:
    """As ``soft_embed_torch.scan``, over the candidates; of a shard, over those that are its own."""
    ids, scores = inputs.ids, noisy_scores(inputs, options)
    assert ids is not None
    highest, place = scores.max(1, keepdim=True)
    peak = highest.clamp_min(torch.finfo(scores.dtype).min)
    logs = scores - peak
    weights = logs.exp()
    moment = (logs.clamp_min(LOG_FLOOR) * weights).sum(1, keepdim=True) if stats else None
    acc = weighted_rows(weights, inputs.values, ids)
    return OnlineState(peak, weights.sum(1, keepdim=True), acc, moment, ids.gather(1, place) if stats else None)


def noisy_scores(inputs: Inputs, options: Options) -> Tensor:
    """The candidates' scores [T, C] as the softmax gets them."""
    return _scores(inputs, Scorer(inputs, options))[0]


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Grads:
    """As ``soft_embed_torch.backward``."""
    head, embed, bias = inputs[1:4]
    ids, scorer = inputs.ids, Scorer(inputs, options)
    assert ids is not None
    upstream, constant, slope = upstream_of(grad_out, grad_lse, grad_entropy, saved, options, scorer.dtype)
    scores, noise = _scores(inputs, scorer)
    logs = (scores - saved.peak[:, None]).clamp_min_(LOG_FLOOR)
    weights = logs.exp()
    grad = row_dots(upstream, inputs.values, ids).sub_(constant)
    if slope is not None:
        grad.addcmul_(logs, slope, value=-1.0)
    grad.mul_(weights)
    grad_temperature = grad_noise = grad_values = grad_rows = grad_head = grad_embed = grad_bias = None
    if needs.temperature:
        grad_temperature = -(logs.mul_(grad)).sum(1)
    if noise is not None and (needs.temperature or needs.noise_scale):
        noise_sum = (grad * noise).sum(1, keepdim=True)
        if grad_temperature is not None:  # of the scores without noise
            grad_temperature += (noise_sum * scorer.noise_scale)[:, 0]
        if needs.noise_scale:
            grad_noise = noise_sum[:, 0]
    if needs.bias_values:
        grad_values = _entry_gradient(grad * scorer.inverse_temperature, inputs, options.vocab_start)
    if scorer.capped:
        logits = _logits(inputs) * scorer.inner if head is None else row_dots(scorer.rows, head, ids)
        if bias is not None:
            logits += bias[ids].to(scorer.dtype) * scorer.inner
        grad = scorer.backpropagate(grad, logits.tanh_(), _ALL)
    if bias is not None and needs.bias:
        grad_bias = grad.new_zeros(inputs.num_vocab).index_add_(0, ids.flatten(), (grad * scorer.inner).flatten())
    if needs.hidden and head is None:
        grad_rows = inputs.hidden.new_zeros(inputs.num_rows, inputs.num_vocab)
        grad_rows.scatter_add_(1, ids, (grad * scorer.inner).to(grad_rows.dtype))
    elif needs.hidden:
        grad_rows = weighted_rows(grad, head, ids).mul_(scorer.inner)  # type: ignore[arg-type]
    taken = weights
    if saved.token is not None:
        here = (ids + options.vocab_start == saved.token[:, None]) & (scores > -torch.inf)
        taken = torch.where(saved.token[:, None] < 0, weights, here * saved.total[:, None])
    if head is not None and needs.head:
        tied = [(taken, upstream)] if embed is None else []
        grad_head = scatter_rows(ids, inputs.num_vocab, head.dtype, (grad, scorer.rows), *tied)
    if embed is not None and needs.embed:
        grad_embed = scatter_rows(ids, inputs.num_vocab, embed.dtype, (taken, upstream))
    return Grads(grad_rows, grad_head, grad_embed, grad_bias, grad_temperature, grad_noise, grad_values)


def _scores(inputs: Inputs, scorer: Scorer) -> tuple[Tensor, Tensor | None]:
    """The candidates' scores [T, C], with noise, and the standard noise."""
    ids, scores = inputs.ids, inputs.scores
    assert ids is not None
    assert scores is not None
    if scorer.seeds is None:
        return scores, None
    noise = gumbel_at(scorer.seeds.expand(len(ids)), ids + scorer.vocab_start).to(scores.dtype)
    return scores + noise * scorer.noise_scale, noise


def _logits(inputs: Inputs) -> Tensor:
    """Given logits of the candidates, [T, C] in the accumulation dtype."""
    ids, logits = inputs.ids, inputs.hidden
    assert ids is not None
    places = torch.arange(inputs.num_rows, device=ids.device) if inputs.places is None else inputs.places
    return logits[(*(each[:, None] for each in inputs.index_of(places)), ids)].to(accumulation_dtype(logits.dtype))


def _entry_gradient(grad: Tensor, inputs: Inputs, start: int) -> Tensor:
    """[T, m]: of each entry of `bias_ids` the gradient [T, C] of the candidate that it is, or 0."""
    assert inputs.bias_ids is not None
    assert inputs.ids is not None
    assert inputs.scores is not None
    none = torch.iinfo(torch.int64).max
    ids, order = inputs.ids.masked_fill(inputs.scores == -torch.inf, none).sort(1)
    wanted = (inputs.bias_ids - start).contiguous()
    place = torch.searchsorted(ids, wanted).clamp_max_(ids.shape[1] - 1)
    return grad.gather(1, order.gather(1, place)).masked_fill_(ids.gather(1, place) != wanted, 0.0)


def weighted_rows(weights: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """``sum over c of weights[t, c] * matrix[ids[t, c]]``: [T, E] in the weights' dtype.

    Args:
        weights: [T, C]. matrix: [V, E]. ids: [T, C] int64.
    """
    out = weights.new_empty(weights.shape[0], matrix.shape[1])
    for rows, gathered in _gathered(matrix, ids, weights.dtype):
        torch.bmm(weights[rows, None], gathered, out=out[rows, None])
    return out


def row_dots(vectors: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """``vectors[t] @ matrix[ids[t, c]]``: [T, C] in the vectors' dtype, of vectors [T, E]."""
    out = vectors.new_empty(ids.shape)
    for rows, gathered in _gathered(matrix, ids, vectors.dtype):
        torch.bmm(vectors[rows, None], gathered.transpose(1, 2), out=out[rows, None])
    return out


def _gathered(matrix: Tensor, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows [R, C, E] that the ids name, for a few rows of ids at a time; valid until the next."""
    (num_rows, count), width = ids.shape, matrix.shape[1]
    size = max(1, min(num_rows, _GATHERED_BYTES // (count * width * dtype.itemsize)))
    buffer = matrix.new_empty(size * count, width)
    wide = buffer if matrix.dtype == dtype else matrix.new_empty(size * count, width, dtype=dtype)
    for rows in slices(num_rows, size):
        part = slice(0, (rows.stop - rows.start) * count)
        torch.index_select(matrix, 0, ids[rows].flatten(), out=buffer[part])
        if wide is not buffer:
            wide[part] = buffer[part]
        yield rows, wide[part].view(-1, count, width)


def scatter_rows(ids: Tensor, num_vocab: int, dtype: torch.dtype, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``out[v] = sum of weights[t, c] * vectors[t]`` over the (t, c) with ids[t, c] = v and over the pairs: [V, E].

    The sums are in the weights' dtype and in one order, so that two runs give the same bits.

    Args:
        pairs: weights [T, C] and vectors [T, E].
    """
    (num_rows, count), width = ids.shape, pairs[0][1].shape[1]
    out = torch.zeros((num_vocab, width), dtype=dtype, device=ids.device)
    named, place = ids.unique(return_inverse=True)
    place, order = place.flatten().sort(stable=True)
    row = order // count
    size = max(1, _GATHERED_BYTES // (width * pairs[0][0].dtype.itemsize))
    for part in slices(len(named), size):
        some = slice(*torch.searchsorted(place, torch.tensor([part.start, part.stop])).tolist())
        entries = torch.stack([place[some] - part.start, row[some]])
        total = pairs[0][0].new_zeros(part.stop - part.start, width)
        for weights, vectors in pairs:
            values = weights.flatten()[order[some]]
            matrix = torch.sparse_coo_tensor(entries, values, (len(total), num_rows), check_invariants=False)
            total.addmm_(matrix, vectors)
        out[named[part]] = total.to(dtype)
    return out
