"""The alternative to an all-gather: candidates that travel round a ring of ranks. Measured against it, not shipped.

Each rank holds one piece of the candidates at a time. While it computes with a piece it sends that piece on and
receives the next, so the exchange of vectors is hidden behind the arithmetic where the network works beside the
processor. In backward a piece's gradient travels with it and can only be sent when its tile is done: that half is
never hidden.

    traffic per rank, W ranks, S bytes of one rank's vectors      forward        backward
    all-gather, reduce-scatter                                     (W - 1) S      2 (W - 1) S
    ring                                                           (W - 1) S      (W - 1) S + W S
    largest buffer                                                 W S against 4 S

All ranks have the same numbers of rows; no options.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from gircse_kernels.contract import Pooled
from torch import Tensor
from torch.autograd.function import once_differentiable

from gircse.ops import info_nce_torch as torch_backend

TEMPERATURE = 0.02


def ring_info_nce(query_steps: Tensor, doc_steps: Tensor) -> Tensor:
    """Losses [K] of all ranks' rows, as `stepwise_info_nce(query_steps, doc_steps, group=dist.group.WORLD)`."""
    return _Ring.apply(query_steps, doc_steps)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_steps: Tensor, doc_steps: Tensor) -> Tensor:
        queries, docs = (torch_backend.pool(steps, "mean") for steps in (query_steps, doc_steps))
        piece, ranks, found = docs.vectors, dist.get_world_size(), None
        for hop in range(ranks):
            following, requests = _pass_on(piece) if hop < ranks - 1 else (piece, [])
            sums = torch_backend.sums(queries.vectors, piece, _target(query_steps, doc_steps, hop), TEMPERATURE)
            found = sums if found is None else found.merge(sums)
            piece = _received(following, requests)
        assert found is not None
        ctx.save_for_backward(query_steps, doc_steps, *queries, *docs, found.peak, found.total)
        losses = (found.total.log() + (found.peak - found.positive)).sum(1)
        dist.all_reduce(losses)
        return losses / (ranks * query_steps.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor]:
        query_steps, doc_steps, queries, query_norms, docs, doc_norms, peak, total = ctx.saved_tensors
        ranks, piece = dist.get_world_size(), docs
        grad_rows, grad_piece = torch.zeros_like(queries), torch.zeros_like(docs)
        weight = grad_losses / (ranks * query_steps.shape[0])
        for hop in range(ranks):
            following, requests = _pass_on(piece) if hop < ranks - 1 else (piece, [])
            candidates = torch_backend.gradients(
                queries, piece, _target(query_steps, doc_steps, hop), TEMPERATURE, peak, total, weight,
                grad_rows=grad_rows,
            )  # fmt: skip
            grad_piece = _received(*_pass_on(grad_piece.add_(candidates)))
            piece = _received(following, requests)
        results = []
        for steps, grad, pooled in (
            (query_steps, grad_rows, Pooled(queries, query_norms)),
            (doc_steps, grad_piece, Pooled(docs, doc_norms)),
        ):
            results.append(torch.empty_like(steps))
            torch_backend.pool_gradient(grad, pooled, "mean", results[-1])
        return results[0], results[1]


def _target(query_steps: Tensor, doc_steps: Tensor, hop: int) -> Tensor:
    """A row's positive is in its own rank's piece, which is there at the first hop."""
    rows, every = query_steps.shape[0], doc_steps.shape[0] // query_steps.shape[0]
    return torch.arange(0, rows * every, every) if hop == 0 else torch.full((rows,), -1)


def _pass_on(piece: Tensor) -> tuple[Tensor, list[dist.Work]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    following = torch.empty_like(piece)
    operations = [
        dist.P2POp(dist.isend, piece, (rank + 1) % ranks),
        dist.P2POp(dist.irecv, following, (rank - 1) % ranks),
    ]
    return following, dist.batch_isend_irecv(operations)


def _received(following: Tensor, requests: list[dist.Work]) -> Tensor:
    for request in requests:
        request.wait()
    return following
