"""The torch backend of ``stepwise_info_nce``: tiles of similarities with an online log-sum-exp, recomputed in backward.

Vectors are laid out step first, [K, B, D] and [K, M, D]. For each step the outer loop walks the candidates in chunks,
the inner one the rows in tiles; one [R, C] tile of similarities exists at a time, forward or backward. Saved for
backward: the vectors, and for every row and step the largest logit and the sum of exponentials relative to it. The
two are kept apart because their sum, the log-sum-exp, would round away the small losses (logits reach 1 /
temperature, 50 and more).

The target's one is subtracted inside its tile (``p - 1``, one element a row): no atomics, two runs are bitwise equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles_torch import matmul_nt, slices, tiling


class Forward(NamedTuple):
    """What a backend's forward returns."""

    losses: Tensor  # [K] mean over the rows
    peak: Tensor  # [K, B, 1] largest logit of the row
    total: Tensor  # [K, B, 1] sum of exp(logit - peak)


def forward(queries: Tensor, docs: Tensor, target: Tensor, temperature: float) -> Forward:
    """Losses [K] of unit vectors queries [K, B, D] against docs [K, M, D], target [B]."""
    num_steps, num_rows, _ = queries.shape
    state = queries.new_empty((num_steps, num_rows, 1))
    peak = torch.full_like(state, torch.finfo(state.dtype).min)
    total, positive = torch.zeros_like(state), torch.zeros_like(state)
    tile, size = _tiling(queries, docs)
    for k in range(num_steps):
        for candidates in slices(docs.shape[1], size):
            chunk = docs[k, candidates]
            for rows in slices(num_rows, tile):
                logits = matmul_nt(queries[k, rows], chunk).div_(temperature)
                inside, index = _target_column(target[rows], candidates)
                torch.where(inside, logits.gather(1, index), positive[k, rows], out=positive[k, rows])
                new_peak = torch.maximum(peak[k, rows], logits.amax(1, keepdim=True))
                total[k, rows] *= (peak[k, rows] - new_peak).exp_()
                total[k, rows] += logits.sub_(new_peak).exp_().sum(1, keepdim=True)
                peak[k, rows] = new_peak
    # log(total) >= 0 and peak - positive >= 0 are exact for a row whose target is the top candidate: no cancellation.
    losses = (total.log() + (peak - positive)).mean((1, 2))
    return Forward(losses, peak, total)


class Saved(NamedTuple):
    """What backward needs of the forward, in the order of ``save_for_backward``; the backend never mutates it."""

    queries: Tensor
    docs: Tensor
    target: Tensor
    peak: Tensor
    total: Tensor


def backward(
    grad_losses: Tensor, saved: Saved, temperature: float, need_queries: bool, need_docs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``sum(grad_losses * losses)`` with respect to queries and docs."""
    queries, docs, target, peak, total = saved
    num_steps, num_rows, _ = queries.shape
    grad_queries = torch.zeros_like(queries) if need_queries else None
    grad_docs = torch.zeros_like(docs) if need_docs else None
    weight = grad_losses / (num_rows * temperature)  # [K]
    tile, size = _tiling(queries, docs)
    for k in range(num_steps):
        for candidates in slices(docs.shape[1], size):
            chunk = docs[k, candidates]
            for rows in slices(num_rows, tile):
                probs = (
                    matmul_nt(queries[k, rows], chunk).div_(temperature).sub_(peak[k, rows]).exp_().div_(total[k, rows])
                )
                inside, index = _target_column(target[rows], candidates)
                probs.scatter_add_(1, index, inside.to(probs.dtype).neg_())
                probs.mul_(weight[k])
                if grad_queries is not None:
                    grad_queries[k, rows] += matmul_nt(probs, chunk.T)
                if grad_docs is not None:
                    grad_docs[k, candidates] += matmul_nt(probs.T, queries[k, rows].T)
    return grad_queries, grad_docs


def _tiling(queries: Tensor, docs: Tensor) -> tuple[int, int]:
    width = queries.shape[2]
    return tiling(
        queries.shape[1], docs.shape[1], tiles=4, per_vocab=width, per_row=width, itemsize=queries.dtype.itemsize
    )


def _target_column(target: Tensor, candidates: slice) -> tuple[Tensor, Tensor]:
    """Whether each row's target lies in this chunk, and its column there (any valid one if not), both [R, 1]."""
    column = (target - candidates.start)[:, None]
    width = candidates.stop - candidates.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)
