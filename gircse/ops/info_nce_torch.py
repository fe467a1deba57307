"""The torch backend of ``stepwise_info_nce``: pooling, and tiles of similarities with an online softmax.

Vectors are laid out step first, rows [K, B, D] and candidates [K, M, D]. The outer loop walks the candidates in chunks,
the inner one the rows in tiles; one tile of similarities exists at a time, forward or backward: [R, C] of one step, or
[k, R, C] of as many steps as stay in the cache together, so that small batches take few operators. Kept for backward:
for every row and step the largest logit and the sum of exponentials relative to it. The two are kept apart because
their sum, the log-sum-exp, would round away the small losses (logits reach 1 / temperature, 50 and more).

``kernels/gircse_kernels/info_nce/`` offers the same functions. ``sums`` goes on from the ``Sums`` of other candidates,
which is how pieces of the candidates and queries as negatives come in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gircse_kernels.contract import Pooled, Sums
from torch import Tensor

from .tiles_torch import accumulation_dtype, matmul_nt, slices, tiling

BLOCK_BYTES = 1 << 20


def unit_bytes(width: int, itemsize: int) -> int:
    """Of one unit vector of steps of that size of elements."""
    return width * max(itemsize, 4)


def piece_candidates(rows: int, width: int, itemsize: int, budget: int) -> int:
    """Candidates that meet ``rows`` rows in one call: as many as their vectors allow, for ``sums`` and ``gradients``
    hold no more than tiles of similarities."""
    return max(1, budget // unit_bytes(width, itemsize))


def pool(steps: Tensor, pooling: str, first: int = 0, last: int | None = None) -> Pooled:
    """Unit vectors after steps ``first + 1`` to ``last`` (None: all) of steps [B, K, D].

    The mean's 1 / k and the weighted mean's 1 / sum(w) cancel in the norm, so plain sums are normalised.
    """
    rows, num_steps, width = steps.shape
    last = num_steps if last is None else last
    dtype = accumulation_dtype(steps.dtype)
    vectors = torch.empty((last - first, rows, width), dtype=dtype, device=steps.device)
    norms = torch.empty((last - first, rows), dtype=dtype, device=steps.device)
    for part in _row_blocks(vectors):
        unit, norm = vectors[:, part], norms[:, part]
        if pooling == "last":
            unit.copy_(steps[part, first:last].transpose(0, 1))
        else:
            acc = torch.zeros((part.stop - part.start, width), dtype=dtype, device=steps.device)
            for k in range(last):
                out = acc if k < first else unit[k - first]
                acc = torch.add(acc, steps[part, k], alpha=k + 1 if pooling == "weighted" else 1, out=out)
        torch.linalg.vector_norm(unit, dim=-1, out=norm)
        unit.div_(norm.masked_fill(norm == 0, 1.0)[..., None])
    return Pooled(vectors, norms)


def pool_gradient(
    grad: Tensor, pooled: Pooled, pooling: str, out: Tensor, first: int = 0, carry: Tensor | None = None
) -> None:
    """Writes the gradient of steps ``first + 1`` and on into ``out`` [B, K, D] from that of the unit vectors, which is
    used up.

    Call for the last steps first: what they leave for the earlier ones is read from ``out``, or, where its dtype
    would round it, kept in ``carry`` [B, D].
    """
    unit, norms = pooled
    last = first + grad.shape[0]
    weights = [k + 1 if pooling == "weighted" else 1 for k in range(out.shape[1])]
    for part in _row_blocks(grad):
        inner, direction = grad[:, part], unit[:, part]
        along = torch.linalg.vecdot(direction, inner)[..., None]
        inner.addcmul_(direction, along, value=-1.0).mul_(_inverse(norms[:, part]))
        if pooling != "last":
            later = None  # step i takes part in all z_k with k >= i
            if last < out.shape[1]:
                later = out[part, last] / weights[last] if carry is None else carry[part]
            for each in reversed(inner.unbind()):
                later = each if later is None else each.add_(later)
            if carry is not None:
                carry[part] = inner[0]
        if pooling == "weighted":
            torch._foreach_mul_(inner.unbind(), weights[first:last])
        out[part, first:last] = inner.transpose(0, 1)


def _row_blocks(vectors: Tensor) -> Iterator[slice]:
    """Rows whose vectors [K, R, D] stay in the cache while their steps are walked."""
    return slices(vectors.shape[1], max(1, BLOCK_BYTES // (len(vectors) * vectors.shape[2] * vectors.itemsize)))


def _inverse(norms: Tensor) -> Tensor:
    """1 / norm [K, B, 1]; 0 for a zero vector."""
    return torch.where(norms > 0, norms.reciprocal(), 0.0)[..., None]


def sums(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    *,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    into: Sums | None = None,
) -> Sums:
    """Softmax sums of rows [K, B, D] over candidates [K, M, D], and over those that ``into`` has seen, which is used
    up.

    ``target`` [B] int64 (negative: elsewhere), ``mask`` [B, M] bool (True: does not count), ``exclude`` [B] int64 (a
    candidate that does not count; negative: none).
    """
    if into is None:
        first = torch.finfo(rows.dtype).min, 0.0, -torch.inf, -torch.inf
        into = Sums(*(rows.new_full(rows.shape[:2], value) for value in first))
    peaks, totals, positives, hardest = (each[..., None] for each in into)
    for steps, columns, part in _tiles(rows, candidates):
        logits, inside, index = _logits(rows, candidates, target, temperature, mask, exclude, steps, columns, part)
        peak, total, positive, other = (each[steps, part] for each in (peaks, totals, positives, hardest))
        mine = logits.gather(2, index)
        torch.maximum(positive, mine.masked_fill(~inside, -torch.inf), out=positive)
        new_peak = torch.maximum(peak, logits.amax(2, keepdim=True))
        # the target's logit out of the way for a moment: the rest's largest is the hardest negative
        logits.scatter_(2, index, mine.masked_fill(inside, -torch.inf))
        torch.maximum(other, logits.amax(2, keepdim=True), out=other)
        logits.scatter_(2, index, mine)
        total *= (peak - new_peak).exp_()
        total += logits.sub_(new_peak).exp_().sum(2, keepdim=True)
        peak.copy_(new_peak)
    return into


def gradients(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    peak: Tensor,
    total: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    grad_rows: Tensor | None = None,
    need_candidates: bool = True,
) -> Tensor | None:
    """Gradients of ``sum_k weight_k sum_i (log total - (positive - peak))``: that of the rows is added to ``grad_rows``
    [K, B, D] (None: nobody wants it), that of the candidates [K, M, D] returned.

    ``peak`` and ``total`` [K, B] are those over all candidates, of which these may be a part; ``weight`` [K]. The
    target's one is subtracted inside its tile (``p - 1``, one element a row): no atomics, two runs are bitwise equal.
    """
    grad_candidates = torch.zeros_like(candidates) if need_candidates else None
    weight = weight / temperature
    for steps, columns, part in _tiles(rows, candidates):
        logits, inside, index = _logits(rows, candidates, target, temperature, mask, exclude, steps, columns, part)
        probs = logits.sub_(peak[steps, part, None]).exp_().div_(total[steps, part, None])
        probs.scatter_add_(2, index, inside.to(probs.dtype).neg_().expand_as(index))
        probs.mul_(weight[steps, None, None])
        for k, of_step in enumerate(probs, steps.start):
            if grad_rows is not None:
                grad_rows[k, part] += matmul_nt(of_step, candidates[k, columns].T)
            if grad_candidates is not None:
                grad_candidates[k, columns] += matmul_nt(of_step.T, rows[k, part].T)
    return grad_candidates


def _tiles(rows: Tensor, candidates: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Steps, candidates and rows that meet at a time."""
    num_steps, num_rows, width = rows.shape
    num_candidates, itemsize = candidates.shape[1], rows.itemsize
    tile, size = tiling(num_rows, num_candidates, tiles=4, per_vocab=width, per_row=width, itemsize=itemsize)
    for steps in slices(num_steps, max(1, BLOCK_BYTES // (tile * size * itemsize))):
        for columns in slices(num_candidates, size):
            for part in slices(num_rows, tile):
                yield steps, columns, part


def _logits(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    mask: Tensor | None,
    exclude: Tensor | None,
    steps: slice,
    columns: slice,
    part: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile of logits [k, R, C], -inf where a candidate does not count; whether the target is inside [R, 1]; its
    column [k, R, 1]."""
    pairs = zip(rows[steps, part], candidates[steps, columns], strict=True)
    products = [matmul_nt(*pair) for pair in pairs]
    logits = (products[0][None] if len(products) == 1 else torch.stack(products)).div_(temperature)
    if mask is not None:
        logits.masked_fill_(mask[part, columns], -torch.inf)
    if exclude is not None:
        out, column = _in_columns(exclude[part], columns, len(logits))
        logits.scatter_(2, column, logits.gather(2, column).masked_fill_(out, -torch.inf))
    return logits, *_in_columns(target[part], columns, len(logits))


def _in_columns(index: Tensor, columns: slice, num_steps: int) -> tuple[Tensor, Tensor]:
    """Whether each row's index lies in this chunk, [R, 1], and its column there (any valid one if not), [k, R, 1]."""
    column = (index - columns.start)[:, None]
    clamped = column.clamp(0, columns.stop - columns.start - 1)
    return column == clamped, clamped.expand(num_steps, -1, -1)
