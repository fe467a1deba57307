"""Quality of every K from 0 to 20 of all runs of an arm, out of one encoding of the test set with K = 20."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from bench.quality_arms import Arm
from bench.quality_groups import MAX_STEPS, Trainer

DEPTH = 10  # of nDCG


def measure(trainer: Trainer, arm: Arm) -> list[dict[str, Any]]:
    """Of each run: "ranks" [21] strings, one character a query, the rank of its document, "a" for ten, "0" beyond
    `DEPTH`; "ndcg" [21]; "spearman" [21], cosines of document pairs against their relatedness; "neighbours" [20], mean
    cosine of h_0 and g_1, g_1 and g_2, .."""
    tokens, device = trainer.tokens, trainer.device
    sets = [tokens.held_out(corpus) for corpus, _ in tokens.runs]
    states = []
    for kind in ("query", "document"):
        most = max(len(getattr(each, f"{kind}_ids")) for each in sets)
        ids, lengths = (
            torch.stack([_filled(getattr(each, f"{kind}_{what}"), most) for each in sets]).to(device)
            for what in ("ids", "lengths")
        )
        states.append(trainer.encode(ids.long(), lengths.long(), MAX_STEPS, arm))
    results = []
    for run, test in enumerate(sets):
        queries, documents = (
            embeddings(each[run, : len(own)])
            for each, own in zip(states, (test.query_ids, test.document_ids), strict=True)
        )
        rank = ranks(queries, documents, test.relevant.to(device))
        cosines = F.cosine_similarity(states[1][run, :, :-1], states[1][run, :, 1:], dim=-1).mean(0)
        first, second = test.pairs[:, 0].long().to(device), test.pairs[:, 1].long().to(device)
        alike = (documents[first] * documents[second]).sum(-1).T.cpu().numpy()
        strings = ["".join("0" if r > DEPTH else f"{r:x}" for r in row) for row in rank.tolist()]
        results.append(
            {
                "ranks": strings,
                "ndcg": [float(ndcg(row).mean()) for row in strings],
                "spearman": [float(spearmanr(row, test.pairs[:, 2].numpy()).statistic) for row in alike],
                "neighbours": cosines.tolist(),
            }
        )
    return results


def embeddings(states: Tensor) -> Tensor:
    """h_0, g_1..g_K [n, K + 1, D] -> unit embeddings for K = 0 (h_0 itself) and 1..K (means of g_1..g_k)."""
    counts = torch.arange(1, states.shape[1], device=states.device)[:, None]
    means = states[:, 1:].cumsum(1) / counts
    return F.normalize(torch.cat([states[:, :1], means], dim=1), dim=-1)


def ranks(queries: Tensor, documents: Tensor, relevant: Tensor) -> Tensor:
    """[q, K, D], [n, K, D], the answers [q] -> the answers' ranks [K, q], from 1; equal scores count against them."""
    scores = torch.einsum("qkd,nkd->kqn", queries.double(), documents.double())
    own = scores.gather(2, relevant[None, :, None].expand(len(scores), -1, -1))
    return (scores >= own).sum(-1)


def ndcg(ranks: str) -> np.ndarray:
    """A string of "ranks" -> each query's nDCG@10, [n]."""
    rank = np.array([int(digit, 16) for digit in ranks])
    return np.where(rank > 0, 1 / np.log2(np.where(rank > 0, rank, 1) + 1), 0.0)


def _filled(values: Tensor, count: int) -> Tensor:
    """Repeats the last row up to `count` rows."""
    return torch.cat([values, values[-1:].expand(count - len(values), *values.shape[1:])])
