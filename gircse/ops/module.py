"""`SoftEmbedding`: the soft tokens of a given model, which knows the facts about its head and embedding layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .head_facts import HeadFacts, below_peft, text_config, vocabulary_layers
from .soft_embed import SoftTokenStats, soft_embed
from .top_tokens import top_tokens

# Relative error ||ours - theirs|| / ||theirs|| that rounding explains; a wrong fact is off by far more.
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_PROBE_TOKENS = 6


class SoftEmbedding(nn.Module):
    """Hidden states of a model to soft tokens for the same model, what its embedding layer would give.

    Looks at the model's head and embedding layer in every call without owning them: no parameters of its own, an empty
    `state_dict`, tied weights stay tied, and gradients arrive at the model's parameters. It follows the model to
    another device or dtype, under a LoRA adapter on head or table (`HeadFacts.of`), and to a table of another size.
    Works under autograd and `torch.compile`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = (model,)  # a tuple: a module in it does not become a submodule

    @property
    def facts(self) -> HeadFacts:
        return HeadFacts.of(self._model[0])

    def forward(
        self, hidden: Tensor, *, bias: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, SoftTokenStats]:
        """Soft tokens [..., E] of hidden [..., D], in its dtype.

        Args:
            hidden: last hidden states, after the model's final norm.
            bias: [V], added to the model's own logits before its scale and soft-cap. An entry of -inf bans its token.
            options: the arguments of `soft_embed` that belong to no model: temperature, top_k, top_p, min_p,
                gumbel_seed, gumbel_temperature, hard, return_stats, backend.

        Raises:
            ValueError: an adapter changes head or table in a way that no weight says; a ban by -inf where the model's
                soft-cap would lift it.
        """
        facts = self.facts
        scores = facts.score_options()
        if bias is not None:
            scores["bias"] = _with_bias(facts, bias)
        return soft_embed(
            hidden, facts.head_weight, facts.tied_or_table, embed_scale=facts.embed_scale, **scores, **options
        )

    def top_tokens(self, hidden: Tensor, n: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Ids and probabilities [..., n] of the most probable tokens; options: temperature, backend."""
        facts = self.facts
        return top_tokens(hidden, facts.head_weight, n, **facts.score_options(), **options)

    def extra_repr(self) -> str:
        facts = self.facts
        (vocab, width), tied = facts.head_weight.shape, facts.tied_or_table is None
        return (
            f"vocab={vocab}, hidden={width}, embedding={facts.embed_weight.shape[1]}, tied={tied}, "
            f"embed_scale={facts.embed_scale:g}, logit_scale={facts.logit_scale:g}, softcap={facts.softcap}"
        )


def from_model(model: Any, *, probe: bool = True) -> SoftEmbedding:
    """The soft tokens of a language model of transformers, also under a PEFT adapter; of an encoder-decoder those of
    its decoder.

    Args:
        model: a `PreTrainedModel` with a language-model head, or a `peft.PeftModel` around one. It is not changed. What
            is done to it later (an adapter, another table) counts from the next call on.
        probe: run a few tokens through the model and compare its own logits and embeddings with the facts that were
            found. A forgotten scale does not crash, it quietly gives wrong soft tokens.

    Raises:
        ValueError: no head or embedding, an adapter on one of them that is no plain LoRA, or a fact that does not hold.
    """
    inner = below_peft(model)
    soft = SoftEmbedding(inner)
    facts = soft.facts
    if probe:
        _probe(inner, facts)
    return soft


@torch.no_grad()
def _probe(model: Any, facts: HeadFacts) -> None:
    weight, was_training = facts.embed_weight, model.training
    ids = torch.linspace(0, weight.shape[0] - 1, _PROBE_TOKENS, device=weight.device).long()[None]
    padding = getattr(text_config(model), "pad_token_id", None)
    if padding is not None:  # to which some models give no position
        ids = torch.where(ids == padding, (ids + 1) % weight.shape[0], ids)
    table = facts.embed_scale * weight[ids]
    model.eval()
    try:
        _, embedding = vocabulary_layers(model)
        found = [("embed_scale", table, embedding(ids))]
        if getattr(model.config, "is_encoder_decoder", False):
            states, theirs = _decode(model, decoder_input_ids=ids)
            found.append(("embed_scale in the decoder", _decode(model, decoder_inputs_embeds=table)[1], theirs))
        elif model.base_model is model:
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            states, theirs = output.hidden_states[-1], output.logits
        else:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            theirs = model(input_ids=ids, use_cache=False).logits
        found.append(("the head's weight, bias, logit_scale and softcap", facts.logits(states), theirs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that does not take a few token ids
        raise ValueError(
            f"model: {type(model).__name__} cannot be probed: {type(error).__name__}: {error}; expected a language "
            "model over token ids (probe=False goes without)"
        ) from error
    finally:
        model.train(was_training)
    for fact, ours, theirs in found:
        _check(model, fact, ours, theirs)


def _decode(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of an encoder-decoder, which is asked about what it decodes only: an encoder of
    token ids reads one token, any other is left out."""
    if model.main_input_name == "input_ids":
        (tokens,) = inputs.values()
        read: dict[str, Any] = {"input_ids": torch.ones(1, 1, dtype=torch.long, device=tokens.device)}
    else:
        weight = model.get_output_embeddings().weight
        read = {"encoder_outputs": (weight.new_zeros(1, 1, model.config.hidden_size),)}
    output = model(**read, **inputs, output_hidden_states=True, use_cache=False)
    return output.decoder_hidden_states[-1], output.logits


def _with_bias(facts: HeadFacts, bias: Tensor) -> Tensor:
    if facts.softcap is not None:
        banned, reason = torch.isneginf(bias).any(), f"which the model's soft-cap of {facts.softcap} would lift"
        if torch.compiler.is_compiling():
            torch._assert_async(banned.logical_not(), f"bias: got -inf, {reason}")
        elif banned:
            raise ValueError(
                f"bias: got -inf, {reason}; expected finite numbers (ban by leaving rows out: `soft_embed` on the rows "
                "of facts.head_weight, facts.embed_weight and facts.bias that stay)"
            )
    return bias if facts.bias is None else facts.bias + bias


def _check(model: Any, fact: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
    tolerance = PROBE_TOLERANCE.get(theirs.dtype, 6e-2)
    if not error <= tolerance:
        raise ValueError(
            f"model: the probe of {fact} failed on {type(model).__name__}: relative difference {error:.2e} to its own "
            f"output, expected <= {tolerance:.0e}"
        )
