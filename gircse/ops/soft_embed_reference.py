"""`soft_embed`, its truncation and `top_tokens` in plain PyTorch: what tests and benchmarks compare with.

It computes in the dtype it is given and lets autograd differentiate; pass float64 for the truth, or a lower dtype for
"what eager PyTorch does". It holds [T, V] tensors, which the ops never do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .soft_embed import FullStats, SoftTokenStats


def scores_reference(
    hidden: Tensor,
    head_weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """``softcap(logit_scale * (hidden @ head_weight.T + bias)) / temperature``, [..., V]."""
    logits = hidden if head_weight is None else hidden @ head_weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / _column(temperature, hidden)


def soft_embed_reference(
    hidden: Tensor,
    head_weight: Tensor | None,
    embed_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    embed_scale: float = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_n: int | Tensor | None = None,
    token_bitmask: Tensor | None = None,
    logit_bias: tuple[Tensor, Tensor] | None = None,
    noise: Tensor | None = None,
    noise_scale: float | Tensor = 1.0,
    gumbel_temperature: float | Tensor | None = None,
    hard: bool | Tensor = False,
) -> tuple[Tensor, SoftTokenStats]:
    """`gircse.ops.soft_embed` with ``return_stats=True``, or, without a head, `soft_embed_logits` of ``hidden``.

    noise [..., V] is what its ``gumbel_seed`` draws.
    """
    scores = scores_reference(hidden, head_weight, bias=bias, softcap=softcap, logit_scale=logit_scale)
    if logit_bias is not None:
        scores = scores.scatter_add(-1, *logit_bias)
    scores = scores / _column(temperature, hidden)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if token_bitmask is not None:
        bits = token_bitmask[..., None] >> torch.arange(32, dtype=torch.int32, device=scores.device) & 1
        allowed = bits.bool().flatten(-2)[..., : scores.shape[-1]]
    considered = scores.detach().masked_fill(~allowed, -torch.inf)
    full = FullStats(*_statistics(considered))
    kept = allowed & truncation_reference(considered, top_k=top_k, top_p=top_p, min_p=min_p, top_n=top_n)
    if noise is not None:
        noise = noise * _column(noise_scale, hidden)
        if gumbel_temperature is None:
            scores = scores + noise / _column(temperature, hidden)
        else:
            scores = (scores + noise) / _column(gumbel_temperature, hidden)
    scores = scores.masked_fill(~kept, -torch.inf)
    probs = torch.softmax(scores, -1)
    values = head_weight if embed_weight is None else embed_weight
    assert values is not None
    lse, entropy, peak, argmax = _statistics(scores)
    one_hot = argmax[..., None] == torch.arange(probs.shape[-1], device=probs.device)
    taken = one_hot + (probs - probs.detach())  # straight-through, as F.gumbel_softmax(hard=True)
    taken = torch.where(torch.as_tensor(hard, device=probs.device)[..., None], taken, probs)
    return embed_scale * (taken @ values), SoftTokenStats(lse, entropy, peak, argmax, full)


def _statistics(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp, entropy, largest probability and its index of scores [..., V]."""
    log_probs = torch.log_softmax(scores, -1)
    # An entry removed by a bias of -inf counts 0 * -inf = 0.
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)
    return torch.logsumexp(scores, -1), entropy, log_probs.detach().amax(-1).exp(), scores.detach().argmax(-1)


def truncation_reference(
    scores: Tensor,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_n: int | Tensor | None = None,
) -> Tensor:
    """Which scores [..., V] the rules keep, one after the other, by sorting: bool [..., V]."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if top_k is not None:
        k = torch.as_tensor(top_k, device=scores.device).broadcast_to(scores.shape[:-1])[..., None]
        ordered = scores.sort(dim=-1, descending=True).values
        kept &= scores >= ordered.gather(-1, k.clamp_max(scores.shape[-1]) - 1)
    if top_p is not None:
        probs = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        ordered = probs.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # of all that come earlier; of a tie, the first decides
        needed = (before < _column(top_p, scores)).sum(-1, keepdim=True).clamp_min(1)
        kept &= probs >= ordered.gather(-1, needed - 1)
    if min_p is not None:
        probs = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        kept &= probs >= _column(min_p, scores) * probs.amax(-1, keepdim=True)
    if top_n is not None:
        n = torch.as_tensor(top_n, device=scores.device).broadcast_to(scores.shape[:-1])[..., None]
        ordered = scores.masked_fill(~kept, -torch.inf).sort(dim=-1, descending=True).values
        kept &= scores >= ordered.gather(-1, n.clamp_max(scores.shape[-1]) - 1)
    return kept


def _column(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """A number, or one number for each row as [..., 1]."""
    return value.broadcast_to(rows.shape[:-1])[..., None] if isinstance(value, Tensor) else value


def top_tokens_reference(
    hidden: Tensor,
    head_weight: Tensor,
    n: int,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`gircse.ops.top_tokens`."""
    scores = scores_reference(
        hidden, head_weight, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return ids, torch.softmax(scores, -1).gather(-1, ids)
