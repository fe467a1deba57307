"""The torch backend of ``stepwise_info_nce``: pooling, and tiles of similarities with an online softmax.

Vectors are laid out step first, rows [K, B, D] and candidates [K, M, D]. For each step the outer loop walks the
candidates in chunks, the inner one the rows in tiles; one [R, C] tile of similarities exists at a time, forward or
backward. Kept for backward: for every row and step the largest logit and the sum of exponentials relative to it. The
two are kept apart because their sum, the log-sum-exp, would round away the small losses (logits reach 1 / temperature,
50 and more).

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
        acc = torch.zeros((part.stop - part.start, width), dtype=dtype, device=steps.device)
        for k in range(first if pooling == "last" else 0, last):
            if pooling == "last":
                acc = steps[part, k].to(dtype)
            else:
                acc.add_(steps[part, k].to(dtype), alpha=k + 1 if pooling == "weighted" else 1)
            if k >= first:
                norm = torch.linalg.vector_norm(acc, dim=-1)
                norms[k - first, part] = norm
                torch.div(acc, norm.masked_fill(norm == 0, 1.0)[:, None], out=vectors[k - first, part])
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
        later = None  # step i takes part in all z_k with k >= i
        if pooling != "last" and last < out.shape[1]:
            later = out[part, last] / weights[last] if carry is None else carry[part]
        for k in reversed(range(first, last)):
            inner, direction = grad[k - first, part], unit[k - first, part]
            along = torch.linalg.vecdot(direction, inner)[:, None]
            inner.addcmul_(direction, along, value=-1.0).mul_(_inverse(norms[k - first, part]))
            if later is not None:
                inner += later
            if pooling != "last":
                later = inner
            out[part, k] = inner * weights[k] if weights[k] > 1 else inner
        if carry is not None and later is not None:
            carry[part] = later


def _row_blocks(vectors: Tensor) -> Iterator[slice]:
    """Rows whose vectors of one step stay in the cache while their steps are walked."""
    return slices(vectors.shape[1], max(1, BLOCK_BYTES // (vectors.shape[2] * vectors.itemsize)))


def _inverse(norms: Tensor) -> Tensor:
    """1 / norm [B, 1]; 0 for a zero vector."""
    return torch.where(norms > 0, norms.reciprocal(), 0.0)[:, None]


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
    num_steps, num_rows, _ = rows.shape
    if into is None:
        first = torch.finfo(rows.dtype).min, 0.0, -torch.inf, -torch.inf
        into = Sums(*(rows.new_full((num_steps, num_rows), value) for value in first))
    peak, total, positive, hardest = (each[..., None] for each in into)
    tile, size = _tiling(rows, candidates)
    for k in range(num_steps):
        for columns in slices(candidates.shape[1], size):
            for part in slices(num_rows, tile):
                logits, inside, index = _logits(
                    rows[k, part], candidates[k, columns], target[part], temperature, mask, exclude, part, columns
                )
                mine = torch.where(inside, logits.gather(1, index), -torch.inf)
                torch.maximum(positive[k, part], mine, out=positive[k, part])
                highest = logits.amax(1, keepdim=True)
                new_peak = torch.maximum(peak[k, part], highest)
                # the target's logit out of the way for a moment: the rest's largest is the hardest negative
                kept = logits.gather(1, index)
                logits.scatter_(1, index, kept.masked_fill(inside, -torch.inf))
                torch.maximum(hardest[k, part], logits.amax(1, keepdim=True), out=hardest[k, part])
                logits.scatter_(1, index, kept)
                total[k, part] *= (peak[k, part] - new_peak).exp_()
                total[k, part] += logits.sub_(new_peak).exp_().sum(1, keepdim=True)
                peak[k, part] = new_peak
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
    num_steps, num_rows, _ = rows.shape
    grad_candidates = torch.zeros_like(candidates) if need_candidates else None
    weight = weight / temperature
    tile, size = _tiling(rows, candidates)
    for k in range(num_steps):
        for columns in slices(candidates.shape[1], size):
            chunk = candidates[k, columns]
            for part in slices(num_rows, tile):
                logits, inside, index = _logits(
                    rows[k, part], chunk, target[part], temperature, mask, exclude, part, columns
                )
                probs = logits.sub_(peak[k, part, None]).exp_().div_(total[k, part, None])
                probs.scatter_add_(1, index, inside.to(probs.dtype).neg_())
                probs.mul_(weight[k])
                if grad_rows is not None:
                    grad_rows[k, part] += matmul_nt(probs, chunk.T)
                if grad_candidates is not None:
                    grad_candidates[k, columns] += matmul_nt(probs.T, rows[k, part].T)
    return grad_candidates


def _logits(
    rows: Tensor,
    chunk: Tensor,
    target: Tensor,
    temperature: float,
    mask: Tensor | None,
    exclude: Tensor | None,
    part: slice,
    columns: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile of logits, -inf where a candidate does not count; whether the target is inside; its column."""
    logits = matmul_nt(rows, chunk).div_(temperature)
    if mask is not None:
        logits.masked_fill_(mask[part, columns], -torch.inf)
    if exclude is not None:
        out, column = _in_columns(exclude[part], columns)
        logits.scatter_(1, column, torch.where(out, -torch.inf, logits.gather(1, column)))
    return logits, *_in_columns(target, columns)


def _tiling(rows: Tensor, candidates: Tensor) -> tuple[int, int]:
    width = rows.shape[2]
    return tiling(
        rows.shape[1], candidates.shape[1], tiles=4, per_vocab=width, per_row=width, itemsize=rows.dtype.itemsize
    )


def _in_columns(index: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each row's index lies in this chunk, and its column there (any valid one if not), both [R, 1]."""
    column = (index - columns.start)[:, None]
    width = columns.stop - columns.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)
