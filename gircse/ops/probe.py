"""Probes: what the facts of a language model give on a few tokens is compared with what the model itself computes.

A forgotten scale does not crash; it quietly gives wrong soft tokens. Every place that relies on a fact probes it here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .head_facts import HeadFacts, UnsupportedModelError, text_config, vocabulary_layers

# The relative error that rounding explains. A wrong fact is off by far more.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_TOKENS = 6


def probe_tokens(model: Any, facts: HeadFacts) -> Tensor:
    """[1, 6] token ids from the whole vocabulary, without the padding token, to which some models give no position."""
    vocabulary = len(facts.embed_weight)
    ids = torch.linspace(0, vocabulary - 1, _TOKENS, device=facts.embed_weight.device).long()[None]
    padding = getattr(text_config(model), "pad_token_id", None)
    return ids if padding is None else torch.where(ids == padding, (ids + 1) % vocabulary, ids)


@torch.no_grad()
def probe_head_and_table(model: Any, facts: HeadFacts) -> Tensor:
    """Compares the model's own embeddings and logits of `probe_tokens` with those that the facts give.

    Args:
        model: a language model of transformers, in eval mode.

    Returns:
        [1, 6, D], the model's last hidden states at these tokens.

    Raises:
        UnsupportedModelError: a fact does not hold, or the model cannot be called with token ids.
    """
    ids = probe_tokens(model, facts)
    table = facts.embed_scale * facts.embed_weight[ids]
    try:
        _, embedding = vocabulary_layers(model)
        compared = [("embed_scale", table, embedding(ids))]
        if getattr(model.config, "is_encoder_decoder", False):
            states, theirs = _decode(model, decoder_input_ids=ids)
            compared.append(("embed_scale in the decoder", _decode(model, decoder_inputs_embeds=table)[1], theirs))
        elif model.base_model is model:
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            states, theirs = output.hidden_states[-1], output.logits
        else:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            theirs = model(input_ids=ids, use_cache=False).logits
        compared.append(("the head's weight, bias, logit_scale and softcap", facts.logits(states), theirs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # A model that is not made for token ids may raise anything.
        raise UnsupportedModelError(
            f"model: {type(model).__name__} cannot be probed: {type(error).__name__}: {error}; expected a language "
            "model over token ids"
        ) from error
    for fact, ours, theirs in compared:
        check_probe(model, fact, ours, theirs)
    return states


def check_probe(model: Any, fact: str, ours: Tensor, theirs: Tensor) -> None:
    """
    Raises:
        UnsupportedModelError: `ours` is further from the model's own output `theirs` than rounding explains.
    """
    name = f"{type(model).__name__} (model_type {model.config.model_type!r})"
    if ours.shape != theirs.shape:
        raise UnsupportedModelError(
            f"model: the probe of {fact} failed on {name}: got shape {tuple(ours.shape)}, expected its own, "
            f"{tuple(theirs.shape)}"
        )
    error, tolerance = relative_error(ours, theirs), tolerance_of(theirs.dtype)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"model: the probe of {fact} failed on {name}: got a relative difference of {error:.2e} to its own output, "
            f"expected <= {tolerance:.0e}"
        )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """``||ours - theirs|| / ||theirs||``, in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative error that rounding explains in a dtype."""
    return _TOLERANCE.get(dtype, 6e-2)


def _decode(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of the decoder of an encoder-decoder. An encoder that reads token ids is given one
    token; any other encoder is replaced by one state of zeros."""
    if model.main_input_name == "input_ids":
        (tokens,) = inputs.values()
        source: dict[str, Any] = {"input_ids": torch.ones(1, 1, dtype=torch.long, device=tokens.device)}
    else:
        weight = model.get_output_embeddings().weight
        source = {"encoder_outputs": (weight.new_zeros(1, 1, model.config.hidden_size),)}
    output = model(**source, **inputs, output_hidden_states=True, use_cache=False)
    return output.decoder_hidden_states[-1], output.logits
