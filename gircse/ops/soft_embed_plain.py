"""``soft_embed`` by PyTorch's own differentiable operators, with [T, V] tensors: for derivatives beyond the first."""

from __future__ import annotations

import torch
from gircse_kernels.contract import Inputs, Needs, Options
from torch import Tensor

from .noise import gumbel, gumbel_at
from .scorer import unpack_bits
from .straight_through import one_hot_rows
from .tiles_torch import accumulation_dtype

# Bytes of one [rows, V] tensor, of which a second derivative holds a few dozen.
PLAIN_BYTES = 8 << 20


def plain_rows(inputs: Inputs) -> int:
    """Rows whose plain scores fit the budget."""
    return max(1, PLAIN_BYTES // (inputs.num_vocab * accumulation_dtype(inputs.hidden.dtype).itemsize))


def plain(inputs: Inputs, options: Options, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Soft tokens in their own dtype (or in another), log-sum-exp and entropy in the accumulation dtype.

    Noise and threshold are constants. A removed entry takes part in nothing: its score, often -inf, is replaced before
    it can meet a zero.
    """
    dtype = accumulation_dtype(inputs.hidden.dtype)
    hidden, head, embed, bias, temperature, noise_scale, values = (
        None if t is None else t.to(dtype) for t in inputs[: len(Needs._fields)]
    )
    logits = hidden.flatten(0, -2) if head is None else hidden @ head.T  # type: ignore[operator, union-attr]
    if bias is not None:
        logits = logits + bias
    removed = logits == -torch.inf
    if options.softcap is not None:
        capped = options.softcap * torch.tanh(logits * (options.logit_scale / options.softcap))
        removed = torch.zeros_like(removed)
    else:
        capped = logits.masked_fill(removed, 0.0) * options.logit_scale
    start, num_vocab = options.vocab_start, capped.shape[1]
    if values is not None and inputs.bias_ids is not None:
        columns = inputs.bias_ids - start
        inside = (columns >= 0) & (columns < num_vocab)
        capped = capped.scatter_add(1, columns.masked_fill(~inside, 0), values.masked_fill(~inside, 0.0))
        banned = capped.detach() == -torch.inf
        removed, capped = removed | banned, capped.masked_fill(banned, 0.0)
    if inputs.bitmask is not None:
        removed = removed | ~unpack_bits(inputs.bitmask, start, start + num_vocab)
    factor: float | Tensor = 1.0 / options.temperature
    if temperature is not None:
        factor = factor / temperature[:, None]
    scores = capped * factor
    if inputs.threshold is not None:
        removed = removed | (scores.detach() < inputs.threshold[:, None])
    seeds = inputs.seeds
    if options.seed is not None:
        seeds = torch.full((1,), options.seed, dtype=torch.int64, device=scores.device)
    if seeds is not None:
        noise = gumbel(seeds, start, start + num_vocab).to(dtype)
        scores = scores + noise * (options.noise_scale if noise_scale is None else noise_scale[:, None])
    scores = scores.masked_fill(removed, -torch.inf)
    log_probs, lse = scores.log_softmax(1), scores.logsumexp(1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.masked_fill(removed, 0.0)).sum(1)
    taken = probs
    if inputs.hard is not None:
        token = torch.where(inputs.hard, scores.detach().argmax(1), -1)
        taken = one_hot_rows(torch.zeros_like(probs), 1.0, token, 0) + (probs - probs.detach())
        taken = torch.where(inputs.hard[:, None], taken, probs)
    out = options.embed_scale * (taken @ (head if embed is None else embed))  # type: ignore[operator]
    return out.to(out_dtype or inputs.out_dtype), lse, entropy


def entry_scores(inputs: Inputs, options: Options, ids: Tensor) -> Tensor:
    """The scores [T, n] of single entries ids [T, n] of this head, with noise; none of them may be removed."""
    dtype, start = accumulation_dtype(inputs.hidden.dtype), options.vocab_start
    hidden, bias, temperature, noise_scale, values = (
        None if t is None else t.to(dtype) for t in (inputs.hidden, *inputs[3 : len(Needs._fields)])
    )
    logits = torch.einsum("td,tnd->tn", hidden, torch.nn.functional.embedding(ids, inputs.head).to(dtype))  # type: ignore[arg-type]
    if bias is not None:
        logits = logits + bias.masked_fill(bias == -torch.inf, 0.0)[ids]
    logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if values is not None and inputs.bias_ids is not None:
        here = (inputs.bias_ids[:, None] - start == ids[..., None]) & (values != -torch.inf)[:, None]
        logits = logits + torch.where(here, values[:, None], 0.0).sum(-1)
    scores = logits / options.temperature
    if temperature is not None:
        scores = scores / temperature[:, None]
    seeds = inputs.seeds
    if options.seed is not None:
        seeds = torch.full((1,), options.seed, dtype=torch.int64, device=ids.device)
    if seeds is not None:
        noise = gumbel_at(seeds.expand(len(ids)), ids + start).to(dtype)
        scores = scores + noise * (options.noise_scale if noise_scale is None else noise_scale[:, None])
    return scores
