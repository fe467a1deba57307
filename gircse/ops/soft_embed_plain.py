"""``soft_embed`` by PyTorch's own differentiable operators, with [T, V] tensors: for derivatives beyond the first."""

from __future__ import annotations

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from .noise import gumbel
from .straight_through import one_hot_rows
from .tiles_torch import accumulation_dtype

# Bytes of one [rows, V] tensor, of which a second derivative holds a few dozen.
PLAIN_BYTES = 8 << 20


def plain_rows(inputs: Inputs) -> int:
    """Rows whose plain scores fit the budget."""
    return max(1, PLAIN_BYTES // (inputs.num_vocab * accumulation_dtype(inputs.hidden.dtype).itemsize))


def plain(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Soft tokens in hidden's dtype, log-sum-exp and entropy in the accumulation dtype.

    Noise and threshold are constants. A removed entry takes part in nothing: its score, often -inf, is replaced before
    it can meet a zero.
    """
    dtype = accumulation_dtype(inputs.hidden.dtype)
    hidden, head, embed, bias, temperature = (None if t is None else t.to(dtype) for t in inputs[:5])
    logits = hidden.flatten(0, -2) if head is None else hidden @ head.T  # type: ignore[operator, union-attr]
    if bias is not None:
        logits = logits + bias
    removed = logits == -torch.inf
    if options.softcap is not None:
        capped = options.softcap * torch.tanh(logits * (options.logit_scale / options.softcap))
        removed = torch.zeros_like(removed)
    else:
        capped = logits.masked_fill(removed, 0.0) * options.logit_scale
    factor: float | Tensor = 1.0 / options.temperature
    if temperature is not None:
        factor = factor / temperature[:, None]
    scores = capped * (factor / options.logit_temperature)
    if inputs.threshold is not None:
        removed = removed | (scores.detach() < inputs.threshold[:, None])
    seeds = inputs.seeds
    if options.seed is not None:
        seeds = torch.tensor([options.seed], device=scores.device)
    if seeds is not None:
        start = options.vocab_start
        scores = scores + gumbel(seeds, start, start + scores.shape[1]).to(dtype) * factor
    scores = scores.masked_fill(removed, -torch.inf)
    log_probs, lse = scores.log_softmax(1), scores.logsumexp(1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.masked_fill(removed, 0.0)).sum(1)
    chosen = probs
    if inputs.hard is not None:
        token = torch.where(inputs.hard, scores.detach().argmax(1), -1)
        chosen = one_hot_rows(torch.zeros_like(probs), 1.0, token, 0) + (probs - probs.detach())
        chosen = torch.where(inputs.hard[:, None], chosen, probs)
    out = options.embed_scale * (chosen @ (head if embed is None else embed))  # type: ignore[operator]
    return out.to(inputs.out_dtype), lse, entropy
