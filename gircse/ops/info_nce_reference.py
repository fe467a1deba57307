"""The stepwise contrastive loss, its pooling and its objective in plain PyTorch, as `soft_embed_reference` for its op.

It holds [B, M] tensors, which the ops never do.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def pool_steps_reference(steps: Tensor, pooling: str = "mean") -> Tensor:
    """`gircse.ops.pool_steps`, one step after the other."""
    pooled = []
    for k in range(1, steps.shape[-2] + 1):
        first = steps[..., :k, :]
        if pooling == "mean":
            pooled.append(first.sum(-2) / k)
        elif pooling == "last":
            pooled.append(first[..., -1, :])
        else:
            weights = torch.arange(1, k + 1, dtype=steps.dtype, device=steps.device)
            pooled.append((weights[:, None] * first).sum(-2) / weights.sum())
    return torch.stack(pooled, -2)


def info_nce_reference(
    query_steps: Tensor,
    doc_steps: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.02,
    pooling: str = "mean",
    mask: Tensor | None = None,
    include_queries: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """`gircse.ops.stepwise_info_nce`; vectors shorter than 1e-12 are divided by 1e-12, not by their norm."""
    rows = query_steps.shape[0]
    if target is None:
        target = torch.arange(rows, device=query_steps.device) * (doc_steps.shape[0] // rows)
    queries = torch.nn.functional.normalize(pool_steps_reference(query_steps, pooling), dim=-1)
    docs = torch.nn.functional.normalize(pool_steps_reference(doc_steps, pooling), dim=-1)
    own = torch.arange(rows, device=target.device)
    losses = []
    for k in range(queries.shape[1]):
        logits = queries[:, k] @ docs[:, k].T / temperature
        if include_queries:
            among = queries[:, k] @ queries[:, k].T / temperature
            logits = torch.cat([logits, among.masked_fill(own[:, None] == own, -torch.inf)], 1)
        if mask is not None:  # its columns are those of the documents, or of documents and queries
            counted = torch.nn.functional.pad(mask, (0, logits.shape[1] - mask.shape[1]))
            logits = logits.masked_fill(counted, -torch.inf)
        loss = torch.nn.functional.cross_entropy(logits, target)
        if symmetric:
            back = docs[target, k] @ queries[:, k].T / temperature
            if mask is not None:
                back = back.masked_fill(mask[:, target].T, -torch.inf)
            loss = (loss + torch.nn.functional.cross_entropy(back, own)) / 2
        losses.append(loss)
    return torch.stack(losses)


def icr_objective_reference(
    losses: Tensor,
    *,
    reg_weight: float = 1.0,
    eps: float = 1e-8,
    reduction: str = "mean",
    detach_previous: bool = False,
) -> Tensor:
    """`gircse.ops.icr_objective`, term by term."""
    total = (losses.mean() if reduction == "mean" else losses.sum()).clone()
    for before, after in pairwise(losses):
        before = before.detach() if detach_previous else before
        total = total + reg_weight * torch.relu(torch.log(after + eps) - torch.log(before + eps)) / (len(losses) - 1)
    return total
