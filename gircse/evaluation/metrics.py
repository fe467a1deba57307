"""Retrieval quality: nDCG, MRR, recall and success of a ranking by cosine similarity, exact and in bounded memory.

The rank of a relevant document is 1 + the number of documents that score higher *or equal*. Ties thus count against
the model: collapsed embeddings, for which all documents score the same, get (almost) nothing instead of whatever the
sort makes of them. Of several relevant documents with one score the ranks run on from the last place of the tie
backwards, as in the worst sorted list.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gircse.integers import as_integer
from gircse.ops.arguments import DTYPES
from gircse.ops.pooling import l2_normalize

_CHUNK = 1024  # queries and documents multiplied at once: 8 MB of scores in float64

Relevant = Sequence[Iterable[int] | int] | torch.Tensor | Any  # one set of document indices, or one index, per query


def _indices(name: str, sets: Any, num_queries: int, num_docs: int) -> list[list[int]]:
    """Checked, sorted document indices per query."""
    if hasattr(sets, "tolist"):
        try:
            sets = sets.tolist()
        except (RuntimeError, NotImplementedError):  # a tensor of another layout, or without values
            raise TypeError(f"{name} must be dense and have values, got {sets!r:.60}") from None
    if not isinstance(sets, Sequence):
        raise TypeError(f"{name} must be a sequence with one entry per query, got {type(sets).__name__}")
    if len(sets) != num_queries:
        raise ValueError(f"{name} must have one entry per query ({num_queries}), got {len(sets)}")
    result = []
    for i, entry in enumerate(sets):
        try:
            docs = sorted(
                {operator.index(d) for d in entry} if isinstance(entry, Iterable) else [operator.index(entry)]
            )
        except TypeError:
            raise TypeError(f"{name}[{i}] must hold integers, got {entry!r}") from None
        if docs and (docs[0] < 0 or docs[-1] >= num_docs):
            raise ValueError(f"{name}[{i}] must lie in 0..{num_docs - 1}, got {docs[0]}..{docs[-1]}")
        result.append(docs)
    return result


def _relevance(relevant: Relevant, excluded: Relevant | None, queries: int, docs: int) -> tuple[list, list]:
    """Both as `_indices`: the relevant documents of each query, at least one, and others that do not count for it."""
    wanted = _indices("relevant", relevant, queries, docs)
    left_out = [[] for _ in wanted] if excluded is None else _indices("excluded", excluded, queries, docs)
    for i, (one, other) in enumerate(zip(wanted, left_out, strict=True)):
        if not one:
            raise ValueError(f"relevant[{i}] is empty: a query without a relevant document cannot be scored")
        if both := set(one) & set(other):
            raise ValueError(f"excluded[{i}] must hold no relevant document, got {min(both)}")
    return wanted, left_out


def _embeddings(values: Any, name: str, dims: int) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an array or a tensor of numbers, got {type(values).__name__}") from None
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(f"{name} must be dense and have values, got {tensor.layout} on {tensor.device}")
    if tensor.dim() != dims or 0 in tensor.shape:
        raise ValueError(f"{name} must have {dims} non-empty dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be floating point of 16 bits or more, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return tensor


def relevant_ranks(
    query_emb: Any, doc_emb: Any, relevant: Relevant, *, excluded: Relevant | None = None
) -> list[list[int]]:
    """Ranks (from 1, ascending) of each query's relevant documents among all documents, by cosine similarity.

    query_emb [n, D], doc_emb [m, D]: numpy or torch, any float dtype (computed in float64), need not be normalised;
    relevant: n sets of indices into doc_emb, or n single indices. excluded: likewise, documents that are not ranked for
    a query, such as the query itself. Ties: see the module. Both sides are multiplied in chunks, so that memory beyond
    the arguments is bounded. Raises ValueError naming the argument for shapes that do not fit, NaN, and queries without
    a relevant document.
    """
    queries, docs = _embeddings(query_emb, "query_emb", 2), _embeddings(doc_emb, "doc_emb", 2)
    if queries.shape[1] != docs.shape[1]:
        raise ValueError(f"query_emb and doc_emb must have the same width, got {queries.shape[1]} and {docs.shape[1]}")
    wanted, left_out = _relevance(relevant, excluded, len(queries), len(docs))
    ranks: list[list[int]] = []
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        ranks += _ranks_of_chunk(queries[part], docs, wanted[part], left_out[part])
    return ranks


def _ranks_of_chunk(
    queries: torch.Tensor, docs: torch.Tensor, wanted: list[list[int]], left_out: list[list[int]]
) -> list[list[int]]:
    queries = l2_normalize(queries.double())
    most = max(map(len, wanted))
    # [queries, most] relevant documents, and their scores; rows with fewer are filled with ones that nothing reaches
    index = torch.tensor([row + [row[0]] * (most - len(row)) for row in wanted], device=docs.device)
    missing = torch.tensor([[j >= len(row) for j in range(most)] for row in wanted], device=queries.device)
    own = torch.empty(index.shape, dtype=torch.float64, device=queries.device)
    for column in range(most):
        relevant = l2_normalize(docs[index[:, column]].to(queries))
        own[:, column] = (queries * relevant).sum(-1)
    own.masked_fill_(missing, math.inf)
    own = own.sort(dim=1, descending=True).values
    # Equal documents must tie, but the last bits of a dot product depend on where in a matrix its column lies. In
    # float64 that margin is so small that nothing else is taken for a tie.
    own -= 4 * torch.finfo(torch.float64).eps * math.sqrt(queries.shape[1])
    ahead = torch.zeros(index.shape, dtype=torch.int64, device=queries.device)
    rows = [(i, d) for i, both in enumerate(zip(wanted, left_out, strict=True)) for row in both for d in row]
    for start in range(0, len(docs), _CHUNK):
        part = l2_normalize(docs[start : start + _CHUNK].to(queries))
        scores = queries @ part.T
        here = [(i, d - start) for i, d in rows if start <= d < start + len(part)]
        # excluded ones do not count, and the relevant ones stand in their own way only through their place in the list
        if here:
            scores[[i for i, _ in here], [d for _, d in here]] = -math.inf
        for column in range(most):
            ahead[:, column] += (scores >= own[:, column : column + 1]).sum(1)
    # The infinite fillings sort to the front: the last len(row) entries are the row's own.
    counts = [line[most - len(row) :] for line, row in zip(ahead.tolist(), wanted, strict=True)]
    return [[n + place for place, n in enumerate(line, start=1)] for line in counts]


def retrieval_metrics(
    query_emb: Any, doc_emb: Any, relevant: Relevant, k: int = 10, *, excluded: Relevant | None = None
) -> dict[str, float]:
    """Means over the queries: {"ndcg@k", "mrr@k", "recall@k", "recall@1", "success@1"}, each in 0..1.

    Arguments and errors as in `relevant_ranks`. nDCG has binary gains and log2 discounts (Jaervelin and Kekaelaeinen
    2002), the ideal being min(k, relevant) hits at the top; recall@j is the share of a query's relevant documents
    among the first j, and success@1 the share of queries whose first document is relevant (the same number where each
    has one).
    """
    k = _check_integer("k", k)
    return metrics_of(relevant_ranks(query_emb, doc_emb, relevant, excluded=excluded), k)


def _check_integer(name: str, value: object) -> int:
    found = as_integer(value)
    if found is None:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if found < 1:
        raise ValueError(f"{name} must be at least 1, got {found}")
    return found


def metrics_of(ranks: list[list[int]], k: int) -> dict[str, float]:
    """Mean nDCG, MRR and recall at k from the ranks (from 1, ascending) of each query's relevant documents.

    Raises ValueError for no queries, or one without a rank.
    """
    k = _check_integer("k", k)
    if not ranks or not all(ranks):
        raise ValueError("ranks must hold at least one query, and each of them at least one rank")

    def gain(hits: Iterable[int]) -> float:
        return sum(1 / math.log2(rank + 1) for rank in hits)

    hits = [[rank for rank in row if rank <= k] for row in ranks]
    rows = list(zip(hits, ranks, strict=True))
    sums = {
        f"ndcg@{k}": math.fsum(gain(hit) / gain(range(1, min(k, len(row)) + 1)) for hit, row in rows),
        f"mrr@{k}": math.fsum(1 / hit[0] if hit else 0.0 for hit in hits),
        f"recall@{k}": math.fsum(len(hit) / len(row) for hit, row in rows),
        "recall@1": math.fsum((row[0] == 1) / len(row) for row in ranks),
        "success@1": math.fsum(row[0] == 1 for row in ranks),
    }
    return {name: total / len(ranks) for name, total in sums.items()}


def metrics_by_step(
    query_steps: Any,
    doc_steps: Any,
    relevant: Relevant,
    steps: Sequence[int] | None = None,
    k: int = 10,
    *,
    excluded: Relevant | None = None,
) -> dict[int, dict[str, float]]:
    """`retrieval_metrics` at each number of steps, out of one encoding with all prefixes.

    query_steps [n, K, D], doc_steps [m, K, D]: entry [:, s - 1] is the embedding after s steps, as
    `encode(return_steps=True)` gives it. steps: which numbers of steps, from 1 to K (default: all). Returns {s:
    metrics} in the order of `steps`.
    """
    queries, docs = _embeddings(query_steps, "query_steps", 3), _embeddings(doc_steps, "doc_steps", 3)
    if queries.shape[1:] != docs.shape[1:]:
        raise ValueError(
            "query_steps and doc_steps must have the same steps and width, "
            f"got {tuple(queries.shape[1:])} and {tuple(docs.shape[1:])}"
        )
    available = queries.shape[1]
    k = _check_integer("k", k)
    if steps is not None and not isinstance(steps, Iterable):
        raise TypeError(f"steps must be a list of integers, got {steps!r}")
    wanted = range(1, available + 1) if steps is None else steps
    chosen = [_check_integer(f"steps[{i}]", step) for i, step in enumerate(wanted)]
    for step in chosen:
        if step > available:
            raise ValueError(f"steps must lie in 1..{available}, got {step}")
    return {
        step: retrieval_metrics(queries[:, step - 1], docs[:, step - 1], relevant, k, excluded=excluded)
        for step in chosen
    }
