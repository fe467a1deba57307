"""``stepwise_info_nce`` by PyTorch's own differentiable operators, with [B, M] tensors: for second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from .pooling import l2_normalize, pool_steps


def plain_losses(
    query_steps: Tensor,
    doc_steps: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: float,
    pooling: str,
    include_queries: bool,
    symmetric: bool,
) -> Tensor:
    """The losses [K]."""
    queries, docs = (l2_normalize(pool_steps(steps, pooling)).movedim(1, 0) for steps in (query_steps, doc_steps))
    own = torch.arange(target.shape[0], device=target.device)
    logits = queries @ docs.mT / temperature  # [K, B, M]
    positive = logits.gather(2, target[:, None].expand(logits.shape[0], -1, 1))[..., 0]
    if include_queries:
        among = queries @ queries.mT / temperature
        logits = torch.cat([logits, among.masked_fill(own[:, None] == own, -torch.inf)], 2)
    if mask is not None:  # its columns are those of the documents, or of documents and queries
        counted = torch.nn.functional.pad(mask, (0, logits.shape[2] - mask.shape[1]))
        logits = logits.masked_fill(counted, -torch.inf)
    losses = (logits.logsumexp(2) - positive).mean(1)
    if not symmetric:
        return losses
    back = docs[:, target] @ queries.mT / temperature
    if mask is not None:
        back = back.masked_fill(mask[:, target].T, -torch.inf)
    return (losses + (back.logsumexp(2) - back.diagonal(0, 1, 2)).mean(1)) / 2
