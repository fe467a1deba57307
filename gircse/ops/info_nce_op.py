"""``stepwise_info_nce`` for autograd: which vectors meet which, and whose gradient is whose.

Up to three products of rows with candidates, each by the backend's ``sums`` and ``gradients``::

    queries x documents                 always; targets are here
    queries x queries, not oneself      include_queries; the first's sums go on
    positives x queries                 symmetric: a second loss, target oneself

Candidates, documents or queries, are those of all ranks of the group. They are pooled, gathered and met a piece at a
time, and a piece's gradient goes back to its owners before the next one is made: beside the inputs there are one
step's vectors of this rank's rows, and of a piece. Sums go on from one piece to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from gircse_kernels.contract import Pooled, Sums
from torch import Tensor

from . import info_nce_torch
from .autocast import no_autocast
from .backends import kernels, resolve_backend
from .differentiable_op import DifferentiableOp, Tensors
from .info_nce_parallel import Piece, Shares, gather, pieces, scatter_sum, shares, total
from .info_nce_plain import plain_losses
from .tiles_torch import accumulation_dtype, slices
from .vocab_parallel import find_group

# Of the unit vectors of several steps that are walked together, and the measure of a piece of candidates.
VECTOR_BYTES = 16 << 20


class Options(NamedTuple):
    """Everything of a call that is no tensor."""

    temperature: float
    pooling: str
    include_queries: bool
    symmetric: bool
    group: str | None  # its name
    backend: str | None


Located: TypeAlias = list[tuple[Piece, Tensor]]  # pieces of candidates, and where in each is each row's own, [B]


class LossCall(NamedTuple):
    """What forward and backward both walk over."""

    module: ModuleType
    options: Options
    query_steps: Tensor  # [B, K, D]
    doc_steps: Tensor  # [M, K, D]
    target: Tensor  # [B], among this rank's documents
    mask: Tensor | None  # [B, all M], or [B, all M + all B]
    mirrored: Tensor | None  # [B, all B], of the symmetric loss
    rows_of: Shares
    docs_of: Shares

    @property
    def query_mask(self) -> Tensor | None:
        """[B, all B], the mask's columns for queries as candidates."""
        if self.mask is None or self.mask.shape[1] == self.docs_of.total:
            return None
        return self.mask[:, self.docs_of.total :]

    @property
    def crossing(self) -> bool:
        """Queries are candidates, too."""
        return self.options.include_queries or self.options.symmetric

    def pool(self, steps: Tensor, group: tuple[int, int]) -> Pooled:
        return self.module.pool(steps, self.options.pooling, *group)

    def groups(self) -> list[tuple[int, int]]:
        """Ranges of steps whose unit vectors, of all ranks, fit the budget; at least one step."""
        num_steps = self.query_steps.shape[1]
        size = max(1, VECTOR_BYTES // (self._row_bytes * (self.rows_of.total + self.docs_of.total)))
        return [(part.start, part.stop) for part in slices(num_steps, size)]

    @property
    def piece_rows(self) -> int:
        """Candidates of each rank that a piece may have; all ranks find the same number."""
        width, itemsize = self.query_steps.shape[2], self.query_steps.dtype.itemsize
        most = self.module.piece_candidates(max(self.rows_of.sizes), width, itemsize, VECTOR_BYTES)
        return max(1, most // len(self.docs_of.sizes))

    @property
    def _row_bytes(self) -> int:
        return self.module.unit_bytes(self.query_steps.shape[2], self.query_steps.dtype.itemsize)

    def document_pieces(self) -> Located:
        return [(piece, piece.locate(self.target)) for piece in pieces(self.docs_of, self.piece_rows)]

    def query_pieces(self) -> Located:
        own = torch.arange(self.target.shape[0], device=self.target.device)
        return [(piece, piece.locate(own)) for piece in pieces(self.rows_of, self.piece_rows)]

    def positives(self, group: tuple[int, int]) -> Tensor:
        """[k, B, D], the unit vector of each row's document."""
        block = max(1, VECTOR_BYTES // (self._row_bytes * group[1]))
        parts = slices(self.target.shape[0], block)
        return torch.cat([self.pool(self.doc_steps[self.target[part], : group[1]], group).vectors for part in parts], 1)


class _StepwiseInfoNCE(DifferentiableOp):
    """Kept are the inputs and two numbers for each row and step; unit vectors are made again in backward."""

    name = "stepwise_info_nce"
    tensors = "Tensor query_steps, Tensor doc_steps, Tensor target, Tensor? mask"
    scalars = "float temperature, str pooling, bool include_queries, bool symmetric, str? group, str? backend"
    num_tensors, num_inputs = 4, 2
    num_results = 7  # losses, accuracy, positive, hardest; what `_sums` keeps, the mirrored mask, sizes of all ranks
    upstream = (0,)
    saved = (4, 5, 6)

    def forward(self, tensors: Tensors, scalars: Sequence[Any]) -> Tensors:
        query_steps, doc_steps, target, mask = tensors
        assert query_steps is not None
        assert doc_steps is not None
        assert target is not None
        options, device = Options(*scalars), query_steps.device
        group = None if options.group is None else find_group(options.group)
        with no_autocast(device.type):
            rows_of, docs_of = (shares(s.shape[0], group, device) for s in (query_steps, doc_steps))
            if mask is not None:
                check_columns(mask, docs_of.total, rows_of.total if options.include_queries else 0)
            mirrored = None
            if options.symmetric and mask is not None:
                # a query whose row does not count this document does not count for it either
                every = gather(target + docs_of.start, rows_of, 0)
                mirrored = gather(mask[:, every].to(torch.uint8), rows_of, 0).bool().T[rows_of.mine].contiguous()
            call = LossCall(
                _module(options.backend, query_steps),
                options, query_steps, doc_steps, target, mask, mirrored, rows_of, docs_of,
            )  # fmt: skip
            found = _sums(call)
            means = total(found.results(options.temperature), rows_of) / rows_of.total
        sizes = None if group is None else torch.tensor([rows_of.sizes, docs_of.sizes])
        # copies: what is returned is no part of one tensor, whose other parts could not be changed in place
        return *(mean.clone() for mean in means), found.kept, mirrored, sizes

    def fake(self, tensors: Tensors, scalars: Sequence[Any]) -> Tensors:
        query_steps, mask, options = tensors[0], tensors[3], Options(*scalars)
        assert query_steps is not None
        rows, num_steps, _ = query_steps.shape
        wide = accumulation_dtype(query_steps.dtype)
        mirrored = sizes = None
        if options.symmetric and mask is not None:
            every = rows if options.group is None else torch.library.get_ctx().new_dynamic_size()
            mirrored = mask.new_empty((rows, every))
        if options.group is not None:
            sizes = torch.empty((2, find_group(options.group).size()), dtype=torch.int64)
        means = [query_steps.new_empty(num_steps, dtype=wide) for _ in range(4)]
        kept = query_steps.new_empty((2 + 2 * options.symmetric, num_steps, rows), dtype=wide)
        return *means, kept, mirrored, sizes

    def backward(
        self, grads: Tensors, tensors: Tensors, saved: Tensors, scalars: Sequence[Any], needs: Sequence[bool]
    ) -> Tensors:
        (grad_losses,), (query_steps, doc_steps, target, mask), options = grads, tensors, Options(*scalars)
        kept, mirrored, sizes = saved
        assert grad_losses is not None
        assert query_steps is not None
        assert doc_steps is not None
        assert target is not None
        assert kept is not None
        if sizes is None or options.group is None:
            rows_of, docs_of = (Shares(None, [steps.shape[0]], 0) for steps in (query_steps, doc_steps))
        else:
            group = find_group(options.group)
            rows_of, docs_of = (Shares(group, each, dist.get_rank(group)) for each in sizes.tolist())
        call = LossCall(
            _module(options.backend, query_steps),
            options, query_steps, doc_steps, target, mask, mirrored if options.symmetric and mask is not None else None,
            rows_of, docs_of,
        )  # fmt: skip
        outs = [
            _StepsGradient(call, steps) if need else None
            for steps, need in zip((query_steps, doc_steps), needs, strict=True)
        ]
        with no_autocast(grad_losses.device.type):
            weight = grad_losses.to(kept.dtype) / (rows_of.total * (1 + options.symmetric))
            located = call.document_pieces(), call.query_pieces() if call.crossing else []
            for part in reversed(call.groups()):
                steps = slice(*part)
                _gradients(call, part, *located, kept[:, steps], weight[steps], *outs)
        return tuple(out if out is None else out.result for out in outs)

    def plain(self, tensors: Tensors, scalars: Sequence[Any]) -> Sequence[Tensor]:
        query_steps, doc_steps, target, mask = tensors
        temperature, pooling, include_queries, symmetric, _, _ = scalars
        assert query_steps is not None
        assert doc_steps is not None
        assert target is not None
        return [plain_losses(query_steps, doc_steps, target, mask, temperature, pooling, include_queries, symmetric)]

    def block(self, tensors: Tensors) -> int:
        raise NotImplementedError("every row of a contrastive loss sees the others")

    def check_again(self, scalars: Sequence[Any]) -> None:
        if Options(*scalars).group is not None:
            raise RuntimeError("group: got a derivative of the gradient, expected first derivatives only")


def check_columns(mask: Tensor, candidates: int, queries: int) -> None:
    """
    Raises:
        ValueError: a mask that has neither a column for each of all candidates nor, with `queries` > 0, also for those.
    """
    if mask.shape[1] not in (candidates, candidates + queries):
        expected = f"({mask.shape[0]}, {candidates})" + (
            f" or ({mask.shape[0]}, {candidates + queries})" * (queries > 0)
        )
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {expected}")


class _StepsGradient:
    """The gradient of one side's steps, written from the last step to the first."""

    def __init__(self, call: LossCall, steps: Tensor) -> None:
        self.call = call
        self.result = torch.empty(steps.shape, dtype=steps.dtype, device=steps.device)
        wide = accumulation_dtype(steps.dtype)
        # what later steps leave for earlier ones is in the result, unless that rounds it
        carried = steps.dtype != wide and len(call.groups()) > 1 and call.options.pooling != "last"
        self.carry = None
        if carried:
            self.carry = torch.empty((steps.shape[0], steps.shape[2]), dtype=wide, device=steps.device)

    def write(self, grad: Tensor, pooled: Pooled, first: int, rows: slice = slice(None)) -> None:
        """From the gradient of the unit vectors of some rows, which is used up."""
        carry = None if self.carry is None else self.carry[rows]
        self.call.module.pool_gradient(grad, pooled, self.call.options.pooling, self.result[rows], first, carry)


def _module(backend: str | None, tensor: Tensor) -> ModuleType:
    return kernels("info_nce") if resolve_backend(backend, tensor) == "triton" else info_nce_torch


class _AllSums(NamedTuple):
    """What the forward finds for this rank's rows, each [K, B]."""

    forward: Sums  # over all that the queries meet
    backward: Sums | None  # of the symmetric loss
    hardest: Tensor  # among documents alone

    @property
    def kept(self) -> Tensor:
        """[2 or 4, K, B], what backward reads."""
        directions = [self.forward] if self.backward is None else [self.forward, self.backward]
        return torch.stack([t for sums in directions for t in (sums.peak, sums.total)])

    def results(self, temperature: float) -> Tensor:
        """Sums over the rows of loss, accuracy, positive, hardest, [4, K]."""
        # log(total) >= 0 and peak - positive >= 0 are exact for a row whose target is on top: no cancellation.
        directions = [self.forward] if self.backward is None else [self.forward, self.backward]
        losses = [sums.total.log().add_(sums.peak - sums.positive) for sums in directions]
        by_row = (
            losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2,
            (self.forward.positive >= self.forward.hardest).to(losses[0].dtype),
            self.forward.positive * temperature,
            (self.hardest * temperature).clamp_min_(-1.0),
        )
        return torch.stack(by_row).sum(2)


def _sums(call: LossCall) -> _AllSums:
    docs = call.document_pieces()
    queries = call.query_pieces() if call.crossing else []
    groups = [_sums_of(call, group, docs, queries) for group in call.groups()]
    if len(groups) == 1:
        return groups[0]
    forward, backward, hardest = zip(*groups, strict=True)

    def joined(parts: Sequence[Sums]) -> Sums:
        return Sums(*map(torch.cat, zip(*parts, strict=True)))

    return _AllSums(joined(forward), joined(backward) if call.options.symmetric else None, torch.cat(hardest))


def _sums_of(call: LossCall, group: tuple[int, int], docs: Located, queries: Located) -> _AllSums:
    """Of some steps."""
    options, sums = call.options, functools.partial(call.module.sums, temperature=call.options.temperature)
    own = call.pool(call.query_steps, group).vectors
    forward: Sums | None = None
    backward: Sums | None = None
    for piece, target in docs:
        candidates = gather(call.pool(call.doc_steps[piece.local], group).vectors, piece.over, 1)
        forward = sums(own, candidates, target, mask=piece.pick(call.mask), into=forward)
    assert forward is not None
    hardest = forward.hardest
    if options.include_queries:
        hardest = hardest.clone()
    positives = call.positives(group) if options.symmetric else None
    for piece, oneself in queries:
        candidates = gather(own[:, piece.local], piece.over, 1)
        if options.include_queries:
            none = torch.full_like(oneself, -1)
            forward = sums(own, candidates, none, mask=piece.pick(call.query_mask), exclude=oneself, into=forward)
        if positives is not None:
            backward = sums(positives, candidates, oneself, mask=piece.pick(call.mirrored), into=backward)
    return _AllSums(forward, backward, hardest)


def _gradients(
    call: LossCall,
    group: tuple[int, int],
    docs: Located,
    queries: Located,
    kept: Tensor,
    weight: Tensor,
    for_queries: _StepsGradient | None,
    for_docs: _StepsGradient | None,
) -> None:
    """The part of these steps in the gradients that are wanted."""
    common: dict[str, Any] = {"temperature": call.options.temperature, "weight": weight}
    pooled = call.pool(call.query_steps, group)
    own = pooled.vectors
    grad_queries = (
        None if for_queries is None else pooled.norms.new_zeros((*pooled.norms.shape, call.query_steps.shape[2]))
    )
    from_positives = None
    if call.crossing:
        from_positives = _crossing_gradients(
            call, group, queries, own, kept, common, grad_queries, for_docs is not None
        )
    for piece, target in docs:
        candidates = call.pool(call.doc_steps[piece.local], group)
        grad = call.module.gradients(
            own, gather(candidates.vectors, piece.over, 1), target, **common,
            peak=kept[0], total=kept[1], mask=piece.pick(call.mask),
            grad_rows=grad_queries, need_candidates=for_docs is not None,
        )  # fmt: skip
        if for_docs is not None:
            grad = scatter_sum(grad, piece.over, 1)
            if from_positives is not None:
                grad = grad.add_(from_positives[:, piece.local])
            for_docs.write(grad, candidates, group[0], piece.local)
    if for_queries is not None and grad_queries is not None:
        for_queries.write(grad_queries, pooled, group[0])


def _crossing_gradients(
    call: LossCall,
    group: tuple[int, int],
    queries: Located,
    own: Tensor,
    kept: Tensor,
    common: dict[str, Any],
    grad_queries: Tensor | None,
    need_docs: bool,
) -> Tensor | None:
    """Where queries are candidates: adds to ``grad_queries``; the gradient of this rank's documents as positives."""
    options, gradients = call.options, call.module.gradients
    positives = call.positives(group) if options.symmetric else None
    grad_positives = None
    if positives is not None and need_docs:
        grad_positives = kept.new_zeros((*positives.shape[:2], call.query_steps.shape[2]))
    for piece, oneself in queries:
        candidates = gather(own[:, piece.local], piece.over, 1)
        found = []
        if options.include_queries and grad_queries is not None:
            none = torch.full_like(oneself, -1)
            among = {"peak": kept[0], "total": kept[1], "mask": piece.pick(call.query_mask), "exclude": oneself}
            found.append(gradients(own, candidates, none, **common, **among, grad_rows=grad_queries))
        if positives is not None:
            back = {"peak": kept[2], "total": kept[3], "mask": piece.pick(call.mirrored)}
            wanted = {"grad_rows": grad_positives, "need_candidates": grad_queries is not None}
            found.append(gradients(positives, candidates, oneself, **common, **back, **wanted))
        if grad_queries is not None:
            grad = found[0] if len(found) == 1 else found[0].add_(found[1])
            grad_queries[:, piece.local] += scatter_sum(grad, piece.over, 1)
    if grad_positives is None:
        return None
    # rows may share a positive; accumulation by sorting, not by atomics
    steps = torch.arange(grad_positives.shape[0], device=grad_positives.device)[:, None]
    result = grad_positives.new_zeros((grad_positives.shape[0], call.doc_steps.shape[0], grad_positives.shape[2]))
    return result.index_put_((steps, call.target[None, :]), grad_positives, accumulate=True)


OP = _StepwiseInfoNCE()
