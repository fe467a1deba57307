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
from .info_nce_parallel import gather, scatter_sum, shares, total
from .info_nce_torch import Pooled, Sums


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
    """(query_steps, doc_steps, target, mask, options) -> losses [K], then accuracy, positive, hardest, [K] each."""

    @staticmethod
    def forward(
        ctx: Any, query_steps: Tensor, doc_steps: Tensor, target: Tensor, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, ...]:
        device, module = query_steps.device, _module(options.backend, query_steps)
        with torch.autocast(device.type, enabled=False):
            queries, docs = module.pool(query_steps, options.pooling), module.pool(doc_steps, options.pooling)
            rows_of, docs_of = (shares(s.shape[0], options.group, device) for s in (query_steps, doc_steps))
            crossing = options.include_queries or options.symmetric
            vectors = Vectors(
                queries.vectors,
                gather(queries.vectors, rows_of, 1) if crossing else queries.vectors,
                gather(docs.vectors, docs_of, 1),
                target + docs_of.start,
                torch.arange(rows_of.start, rows_of.start + target.shape[0], device=device),
            )
            mirrored = None
            if options.symmetric and mask is not None:
                # a query whose row does not count this document does not count for it either
                every = gather(vectors.target, rows_of, 0)
                mirrored = gather(mask[:, every].to(torch.uint8), rows_of, 0).bool().T[rows_of.mine].contiguous()
            problems = _problems(vectors, options, mask, mirrored)
            found = [module.sums(**p._asdict(), temperature=options.temperature) for p in problems]
            forward: Sums = found[0].merge(found[1]) if options.include_queries else found[0]
            directions = [forward, found[-1]] if options.symmetric else [forward]
            # log(total) >= 0 and peak - positive >= 0 are exact for a row whose target is on top: no cancellation.
            each = torch.stack([(s.total.log() + (s.peak - s.positive)).sum(1) for s in directions])
            losses = each.mean(0)
            hardest = (found[0].hardest * options.temperature).clamp_min(-1.0)
            sums = torch.stack(
                [
                    losses,
                    (forward.positive >= forward.hardest).to(losses.dtype).sum(1),
                    found[0].positive.sum(1) * options.temperature,
                    hardest.sum(1),
                ]
            )
            means = total(sums, rows_of) / rows_of.total
        ctx.options, ctx.rows_of, ctx.docs_of = options, rows_of, docs_of
        ctx.dtypes = query_steps.dtype, doc_steps.dtype
        kept = [t for s in directions for t in (s.peak, s.total)]
        ctx.save_for_backward(*queries, *docs, *vectors, mask, mirrored, *kept)
        results = means.unbind()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_losses is None:
            return (None,) * 5
        options, rows_of, docs_of = ctx.options, ctx.rows_of, ctx.docs_of
        q_vectors, q_norms, d_vectors, d_norms, *rest = ctx.saved_tensors
        vectors, (mask, mirrored), kept = Vectors(*rest[:5]), rest[5:7], rest[7:]
        module = _module(options.backend, q_vectors)
        need_queries, need_docs = ctx.needs_input_grad[:2]
        with torch.autocast(grad_losses.device.type, enabled=False):
            weight = grad_losses.to(q_vectors.dtype) / (rows_of.total * (1 + options.symmetric))
            grad_own, grad_queries, grad_docs = _accumulate(
                module, vectors, options, mask, mirrored, kept, weight, need_queries, need_docs
            )
            query_grad = doc_grad = None
            if need_queries:
                if grad_queries is not None:
                    grad_own = grad_own + scatter_sum(grad_queries, rows_of, 1)
                query_grad = module.pool_gradient(grad_own, Pooled(q_vectors, q_norms), options.pooling, ctx.dtypes[0])
            if need_docs:
                own = scatter_sum(grad_docs, docs_of, 1)
                doc_grad = module.pool_gradient(own, Pooled(d_vectors, d_norms), options.pooling, ctx.dtypes[1])
        return query_grad, doc_grad, None, None, None


def _accumulate(
    module: ModuleType,
    vectors: Vectors,
    options: Options,
    mask: Tensor | None,
    mirrored: Tensor | None,
    kept: list[Tensor],
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
