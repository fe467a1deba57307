"""``stepwise_info_nce`` for autograd: which vectors meet which, and whose gradient is whose.

Up to three products of rows with candidates, each by the backend's ``sums`` and ``gradients``::

    queries x documents                 always; targets are here
    queries x queries, not oneself      include_queries; their sums are merged with the first
    positives x queries                 symmetric: a second loss, target oneself

Documents and queries are those of all ranks of the group.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import info_nce_torch
from .backends import kernels, resolve_backend
from .info_nce_parallel import Shares, gather, scatter_sum, shares, total
from .info_nce_torch import Pooled, Sums

VECTOR_BYTES = 16 << 20


class Options(NamedTuple):
    """Everything of a call that is no tensor."""

    temperature: float
    pooling: str
    include_queries: bool
    symmetric: bool
    group: Any
    backend: str | None


class Problem(NamedTuple):
    """One product of rows [K, B, D] with candidates [K, M, D]."""

    rows: Tensor
    candidates: Tensor
    target: Tensor
    mask: Tensor | None = None
    exclude: Tensor | None = None


class Vectors(NamedTuple):
    """This rank's unit vectors and all ranks'."""

    queries: Tensor  # [K, B, D]
    all_queries: Tensor  # [K, all B, D]; queries where nobody needs the others'
    all_docs: Tensor  # [K, all M, D]
    target: Tensor  # [B], in all_docs
    own: Tensor  # [B], this rank's rows in all_queries


def _module(backend: str | None, tensor: Tensor) -> ModuleType:
    return kernels("info_nce") if resolve_backend(backend, tensor) == "triton" else info_nce_torch


def _problems(vectors: Vectors, options: Options, mask: Tensor | None, mirrored: Tensor | None) -> list[Problem]:
    queries, all_queries, all_docs, target, own = vectors
    found = [Problem(queries, all_docs, target, mask)]
    if options.include_queries:
        found.append(Problem(queries, all_queries, torch.full_like(target, -1), exclude=own))
    if options.symmetric:
        found.append(Problem(all_docs[:, target], all_queries, own, mirrored))
    return found


class StepwiseInfoNCE(torch.autograd.Function):
    """(query_steps, doc_steps, target, mask, options) -> losses [K], then accuracy, positive, hardest, [K] each.

    Unit vectors are made for as many steps at a time as ``VECTOR_BYTES`` hold, and again in backward: kept are the
    inputs and two numbers for each row and step.
    """

    @staticmethod
    def forward(
        ctx: Any, query_steps: Tensor, doc_steps: Tensor, target: Tensor, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, ...]:
        device, module = query_steps.device, _module(options.backend, query_steps)
        with torch.autocast(device.type, enabled=False):
            rows_of, docs_of = (shares(s.shape[0], options.group, device) for s in (query_steps, doc_steps))
            target = target + docs_of.start
            mirrored = None
            if options.symmetric and mask is not None:
                # a query whose row does not count this document does not count for it either
                every = gather(target, rows_of, 0)
                mirrored = gather(mask[:, every].to(torch.uint8), rows_of, 0).bool().T[rows_of.mine].contiguous()
            parts, kept = [], []
            for first, last in _groups(query_steps, rows_of, docs_of):
                queries, docs = (module.pool(s, options.pooling, first, last) for s in (query_steps, doc_steps))
                vectors = _exchange(queries, docs, target, rows_of, docs_of, options)
                part, sums = _sums(module, vectors, options, mask, mirrored)
                parts.append(part)
                kept.append(sums)
            means = total(torch.cat(parts, 1), rows_of) / rows_of.total
        ctx.options, ctx.rows_of, ctx.docs_of = options, rows_of, docs_of
        ctx.save_for_backward(query_steps, doc_steps, target, mask, mirrored, torch.cat(kept, 1))
        results = means.unbind()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_losses is None:
            return (None,) * 5
        options, rows_of, docs_of = ctx.options, ctx.rows_of, ctx.docs_of
        query_steps, doc_steps, target, mask, mirrored, kept = ctx.saved_tensors
        module = _module(options.backend, query_steps)
        needs = ctx.needs_input_grad[:2]
        results = [
            torch.empty(steps.shape, dtype=steps.dtype, device=steps.device) if need else None
            for steps, need in zip((query_steps, doc_steps), needs, strict=True)
        ]
        carries: list[Tensor | None] = [None, None]
        with torch.autocast(grad_losses.device.type, enabled=False):
            weight = grad_losses.to(kept.dtype) / (rows_of.total * (1 + options.symmetric))
            for first, last in reversed(_groups(query_steps, rows_of, docs_of)):
                queries, docs = (module.pool(s, options.pooling, first, last) for s in (query_steps, doc_steps))
                vectors = _exchange(queries, docs, target, rows_of, docs_of, options)
                own, others, documents = _accumulate(
                    module, vectors, options, mask, mirrored, kept[:, first:last], weight[first:last], *needs
                )
                if needs[0]:
                    own = own if others is None else own + scatter_sum(others, rows_of, 1)
                if needs[1]:
                    documents = scatter_sum(documents, docs_of, 1)
                for i, (grad, pooled) in enumerate(((own, queries), (documents, docs))):
                    out = results[i]
                    if out is not None:
                        carries[i] = module.pool_gradient(grad, pooled, options.pooling, out, first, carries[i])
        return *results, None, None, None


def _groups(query_steps: Tensor, rows_of: Shares, docs_of: Shares) -> list[tuple[int, int]]:
    """Ranges of steps whose unit vectors, of all ranks, fit the budget; at least one step."""
    _, num_steps, width = query_steps.shape
    itemsize = 8 if query_steps.dtype == torch.float64 else 4
    size = max(1, VECTOR_BYTES // (itemsize * width * (rows_of.total + docs_of.total)))
    return [(first, min(first + size, num_steps)) for first in range(0, num_steps, size)]


def _exchange(
    queries: Pooled, docs: Pooled, target: Tensor, rows_of: Shares, docs_of: Shares, options: Options
) -> Vectors:
    crossing = options.include_queries or options.symmetric
    return Vectors(
        queries.vectors,
        gather(queries.vectors, rows_of, 1) if crossing else queries.vectors,
        gather(docs.vectors, docs_of, 1),
        target,
        torch.arange(rows_of.start, rows_of.start + target.shape[0], device=target.device),
    )


def _sums(
    module: ModuleType, vectors: Vectors, options: Options, mask: Tensor | None, mirrored: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over this rank's rows of loss, accuracy, positive, hardest [4, K]; what backward keeps, [2 or 4, K, B]."""
    problems = _problems(vectors, options, mask, mirrored)
    found = [module.sums(**p._asdict(), temperature=options.temperature) for p in problems]
    forward: Sums = found[0].merge(found[1]) if options.include_queries else found[0]
    directions = [forward, found[-1]] if options.symmetric else [forward]
    # log(total) >= 0 and peak - positive >= 0 are exact for a row whose target is on top: no cancellation.
    losses = torch.stack([(s.total.log() + (s.peak - s.positive)).sum(1) for s in directions]).mean(0)
    hardest = (found[0].hardest * options.temperature).clamp_min(-1.0)
    sums = (
        losses,
        (forward.positive >= forward.hardest).to(losses.dtype).sum(1),
        found[0].positive.sum(1) * options.temperature,
        hardest.sum(1),
    )
    return torch.stack(sums), torch.stack([t for s in directions for t in (s.peak, s.total)])


def _accumulate(
    module: ModuleType,
    vectors: Vectors,
    options: Options,
    mask: Tensor | None,
    mirrored: Tensor | None,
    kept: Tensor,
    weight: Tensor,
    need_queries: bool,
    need_docs: bool,
) -> tuple[Any, Tensor | None, Any]:
    """Gradients of this rank's queries, of all queries as candidates, and of all documents, before any exchange."""
    problems = _problems(vectors, options, mask, mirrored)
    common = {"temperature": options.temperature, "weight": weight}
    main, rest = problems[0], problems[1:]
    grad_own, grad_docs = module.gradients(
        **main._asdict(), **common, peak=kept[0], total=kept[1], need_rows=need_queries, need_candidates=need_docs
    )
    grad_queries = None
    if options.include_queries:
        more, grad_queries = module.gradients(
            **rest.pop(0)._asdict(), **common, peak=kept[0], total=kept[1],
            need_rows=need_queries, need_candidates=need_queries,
        )  # fmt: skip
        if need_queries:
            grad_own = grad_own + more
    if options.symmetric:
        positives, others = module.gradients(
            **rest.pop(0)._asdict(), **common, peak=kept[2], total=kept[3],
            need_rows=need_docs, need_candidates=need_queries,
        )  # fmt: skip
        grad_queries = others if grad_queries is None else grad_queries + others
        if need_docs:
            # rows may share a positive; accumulation by sorting, not by atomics
            steps = torch.arange(weight.shape[0], device=weight.device)[:, None]
            grad_docs = grad_docs.index_put_((steps, vectors.target[None, :]), positives, accumulate=True)
    return grad_own, grad_queries, grad_docs
