"""The mathematics of a GIRCSE model: the soft token of a state, pooling, padding and the limit of positions.

The file is saved beside `modeling_gircse.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POOLINGS = ("mean", "last", "weighted")


def soft_token(lm: Any, hidden: Tensor, temperature: float) -> Tensor:
    """[B, D] hidden states -> [B, D] what the embedding layer gives for a mixture of all tokens."""
    config, embedding = lm.config, lm.get_input_embeddings()
    logits = at_least_float32(lm.get_output_embeddings()(hidden))
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:  # Gemma 2
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits / temperature, dim=-1).to(hidden.dtype)
    if type(embedding).__module__.startswith("peft."):  # only the forward pass applies the adapter to a row
        return weights @ embedding(torch.arange(weights.shape[-1], device=weights.device)).to(hidden.dtype)
    scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).to(hidden.dtype)  # Gemma
    return float(scale) * (weights @ embedding.weight)


def position_limit(config: Any) -> int | None:
    """`max_position_embeddings`, or less where rotary frequencies change beyond some length. transformers chooses them
    for a whole batch by its longest row, so rows would change each other."""
    whole = getattr(config, "max_position_embeddings", None)
    limits, parameters = [whole], getattr(config, "rope_parameters", None) or {}
    for kind in [parameters, *parameters.values()]:
        name = kind.get("rope_type", "") if isinstance(kind, dict) else ""
        if name == "longrope":
            original = kind.get("original_max_position_embeddings")
            limits.append(original or getattr(config, "original_max_position_embeddings", None))
        if "dynamic" in name and whole is not None:
            limits.append(whole - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def pool_steps(states: Tensor, pooling: str) -> Tensor:
    """[B, K, D] states -> [B, K, D], entry k pooled from the first k of them; float32 (or 64)."""
    states = at_least_float32(states)
    if pooling == "last":
        return states
    ordinal = torch.arange(1, states.shape[1] + 1, dtype=states.dtype, device=states.device)[:, None]
    if pooling == "mean":
        return states.cumsum(1) / ordinal
    return (states * ordinal).cumsum(1) / (ordinal * (ordinal + 1) / 2)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pad_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding of each row to its front. Then the last token is in the last column, and sliding windows, which
    count slots, count positions."""
    real = attention_mask != 0
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), real.gather(1, order).long()
