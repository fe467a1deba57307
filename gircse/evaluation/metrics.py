"""Retrieval quality: nDCG, MRR, recall and success of a ranking by cosine similarity, exact and in bounded memory.

The rank of a relevant document is 1 + the number of documents that score higher *or equal*. Ties thus count against
the model. A model whose embeddings have collapsed gives all documents the same score; it gets (almost) nothing, and not
a score that depends on the sort. Several relevant documents with one score take the last places of the tie.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from gircse.integers import check_integer
from gircse.ops.arguments import DTYPES
from gircse.ops.pooling import l2_normalize

_CHUNK = 1024  # queries and documents multiplied at once: 8 MB of scores in float64

Relevant = Sequence[Iterable[int] | int] | torch.Tensor | Any  # one set of document indices, or one index, per query


def _indices(name: str, sets: Any, num_queries: int, num_docs: int) -> list[list[int]]:
    """Sorted document indices for each query."""
    if hasattr(sets, "tolist"):
        try:
            sets = sets.tolist()
        except (RuntimeError, NotImplementedError):  # a tensor of another layout, or without values
            raise TypeError(f"{name}: got {sets!r:.60}, expected a dense tensor with values") from None
    if not isinstance(sets, Sequence):
        raise TypeError(f"{name}: got {type(sets).__name__}, expected a sequence with one entry for each query")
    if len(sets) != num_queries:
        raise ValueError(f"{name}: got {len(sets)} entries, expected {num_queries}, one for each query")
    result = []
    for i, entry in enumerate(sets):
        try:
            docs = sorted(
                {operator.index(d) for d in entry} if isinstance(entry, Iterable) else [operator.index(entry)]
            )
        except TypeError:
            raise TypeError(f"{name}[{i}]: got {entry!r}, expected integers") from None
        if docs and (docs[0] < 0 or docs[-1] >= num_docs):
            raise ValueError(f"{name}[{i}]: got {docs[0]}..{docs[-1]}, expected indices in 0..{num_docs - 1}")
        result.append(docs)
    return result


def _relevance(relevant: Relevant, excluded: Relevant | None, queries: int, docs: int) -> tuple[list, list]:
    """Document indices for each query: its relevant documents (one at least), and those that are not ranked."""
    wanted = _indices("relevant", relevant, queries, docs)
    left_out = [[] for _ in wanted] if excluded is None else _indices("excluded", excluded, queries, docs)
    for i, (one, other) in enumerate(zip(wanted, left_out, strict=True)):
        if not one:
            raise ValueError(f"relevant[{i}]: got no document, expected one or more; the query cannot be scored")
        if both := set(one) & set(other):
            raise ValueError(f"excluded[{i}]: got the relevant document {min(both)}, expected others")
    return wanted, left_out


def finite_tensor(name: str, values: Any, dims: int) -> torch.Tensor:
    """An array or a tensor of finite floating-point numbers with `dims` dimensions, none of them empty, as a tensor.

    Integers are refused, because quantised embeddings that are packed in them would give wrong scores.

    Raises:
        TypeError: `values` is no array of numbers.
        ValueError: another shape, dtype or layout, NaN or infinity.
    """
    try:
        tensor = torch.as_tensor(values if isinstance(values, torch.Tensor) else np.asarray(values)).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {type(values).__name__}, expected an array or a tensor of numbers") from None
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(f"{name}: got {tensor.layout} on {tensor.device}, expected a dense tensor with values")
    if tensor.dim() != dims or 0 in tensor.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {dims} non-empty dimensions")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: got {tensor.dtype}, expected floating point of 16 bits or more")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: got NaN or infinite values, expected finite ones")
    return tensor


def relevant_ranks(
    query_emb: Any, doc_emb: Any, relevant: Relevant, *, excluded: Relevant | None = None
) -> list[list[int]]:
    """Ranks (from 1, ascending) of each query's relevant documents among all documents, by cosine similarity.

    Computed in float64, in chunks, so that memory beyond the arguments is bounded. For ties see the module.

    Args:
        query_emb: [n, D], numpy or torch, any float dtype; need not be normalised.
        doc_emb: [m, D], likewise.
        relevant: n sets of indices into `doc_emb`, or n single indices.
        excluded: likewise, the documents that are not ranked for a query, such as the query itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, NaN or infinity, a query without a relevant document.
    """
    queries, docs = finite_tensor("query_emb", query_emb, 2), finite_tensor("doc_emb", doc_emb, 2)
    if queries.shape[1] != docs.shape[1]:
        raise ValueError(f"doc_emb: got width {docs.shape[1]}, expected {queries.shape[1]}, that of query_emb")
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
    # [queries, most] relevant documents and their scores. Rows with fewer are filled up with infinite scores.
    index = torch.tensor([row + [row[0]] * (most - len(row)) for row in wanted], device=docs.device)
    missing = torch.tensor([[j >= len(row) for j in range(most)] for row in wanted], device=queries.device)
    own = torch.empty(index.shape, dtype=torch.float64, device=queries.device)
    for column in range(most):
        relevant = l2_normalize(docs[index[:, column]].to(queries))
        own[:, column] = (queries * relevant).sum(-1)
    own.masked_fill_(missing, math.inf)
    own = own.sort(dim=1, descending=True).values
    # Equal documents must tie, but the last bits of a dot product depend on where in a matrix its column lies. So a
    # score counts as equal within a margin, which in float64 is too small to make a tie of different documents.
    own -= 4 * torch.finfo(torch.float64).eps * math.sqrt(queries.shape[1])
    ahead = torch.zeros(index.shape, dtype=torch.int64, device=queries.device)
    rows = [(i, d) for i, both in enumerate(zip(wanted, left_out, strict=True)) for row in both for d in row]
    for start in range(0, len(docs), _CHUNK):
        part = l2_normalize(docs[start : start + _CHUNK].to(queries))
        scores = queries @ part.T
        here = [(i, d - start) for i, d in rows if start <= d < start + len(part)]
        # Excluded documents are not counted. Relevant ones are counted below, by their place in the list.
        if here:
            scores[[i for i, _ in here], [d for _, d in here]] = -math.inf
        for column in range(most):
            ahead[:, column] += (scores >= own[:, column : column + 1]).sum(1)
    # Infinite scores were sorted to the front, so the last len(row) entries are the row's own.
    counts = [line[most - len(row) :] for line, row in zip(ahead.tolist(), wanted, strict=True)]
    return [[n + place for place, n in enumerate(line, start=1)] for line in counts]


def retrieval_metrics(
    query_emb: Any, doc_emb: Any, relevant: Relevant, k: int = 10, *, excluded: Relevant | None = None
) -> dict[str, float]:
    """`metrics_of` the `relevant_ranks`; arguments and errors are theirs."""
    k = check_integer("k", k, least=1)
    return metrics_of(relevant_ranks(query_emb, doc_emb, relevant, excluded=excluded), k)


def metrics_of(ranks: list[list[int]], k: int) -> dict[str, float]:
    """Means over the queries: {"ndcg@k", "mrr@k", "recall@k", "recall@1", "success@1"}, each in 0..1.

    nDCG has binary gains and log2 discounts (Jaervelin and Kekaelaeinen 2002); the ideal has min(k, relevant) hits at
    the top. recall@j is the share of a query's relevant documents among the first j. success@1 is the share of queries
    whose first document is relevant; it equals recall@1 where each query has one relevant document.

    Args:
        ranks: of each query's relevant documents, from 1, ascending.

    Raises:
        ValueError: there is no query, or one without a rank; `k` is no integer >= 1.
    """
    k = check_integer("k", k, least=1)
    if not ranks or not all(ranks):
        raise ValueError("ranks: got no query, or one without a rank, expected one rank or more for each")

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
