"""How a causal LM turns a hidden state into logits, and a token into its embedding: the facts behind its soft tokens.

They are read from the model's own layers and config by name, so that this file depends on neither a library nor a class
of models. They are read again for each use, so that an adapter on the head, a table of another size and a cast of the
model count from the next call on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .arguments import KEEP_PLAIN, quantised
from .soft_embed import soft_embed
from .top_tokens import top_tokens

# These relatives of T5 scale the last hidden state by d^-1/2 where head and table are tied; the others have a setting.
_SCALED_WHERE_TIED = ("umt5", "switch_transformers", "udop")
_numbers = WeakIdKeyDictionary()


class UnsupportedModelError(ValueError):
    """The soft tokens of the model cannot be computed correctly; the message says which fact or probe failed."""


class HeadFacts(NamedTuple):
    """``logits = softcap(logit_scale * (hidden @ head_weight.T + bias))``, ``embedding(v) = embed_scale *
    embed_weight[v]``."""

    head: nn.Module  # the layers themselves, below any adapter
    embedding: nn.Module
    head_weight: Tensor  # [V, D]
    embed_weight: Tensor  # [V, E]; the same tensor as `head_weight` where the model ties them
    bias: Tensor | None = None  # [V]
    embed_scale: float = 1.0  # Gemma: sqrt(D) in the table's dtype
    logit_scale: float = 1.0  # Cohere's `logit_scale`, Granite's 1 / `logits_scaling`, a tied T5's d^-1/2
    softcap: float | None = None  # Gemma's `final_logit_softcapping`

    @classmethod
    def of(cls, model: Any) -> HeadFacts:
        """The facts of a language model (`get_input_embeddings`, `get_output_embeddings`, `config`) as it is now,
        without probes. An active LoRA adapter on the head or the table is part of its weight, differentiably; the
        dropout of such an adapter acts on the model's own logits only.

        Raises:
            UnsupportedModelError: there is no head or table with a weight, one of them is quantised, they are of
                different vocabularies, or an adapter changes one of them otherwise than by its weight.
        """
        name = type(model).__name__
        head, embedding = vocabulary_layers(model)
        head_weight, embed_weight = _weight(head, f"output head of {name}"), _weight(embedding, f"table of {name}")
        if len(head_weight) != len(embed_weight):
            raise UnsupportedModelError(
                f"model: got {name} with an output head of {len(head_weight)} rows and an input embedding of "
                f"{len(embed_weight)}, expected one row for each token in both (resize_token_embeddings)"
            )
        head, embedding, config = base_layer(head), base_layer(embedding), text_config(model)
        bias, more = getattr(head, "bias", None), getattr(model, "final_logits_bias", None)
        if more is not None:  # Bart and its kin: a buffer [1, V]
            bias = more[0] if bias is None else bias + more[0]
        softcap = getattr(config, "final_logit_softcapping", None)
        scale = _embed_scale(embedding, embed_weight.dtype)
        return cls(head, embedding, head_weight, embed_weight, bias, scale, _logit_scale(config), softcap)

    @property
    def tied_or_table(self) -> Tensor | None:
        """The `embed_weight` argument of `soft_embed`: None where it is the head's matrix."""
        return None if self.embed_weight is self.head_weight else self.embed_weight

    def score_options(self) -> dict[str, Any]:
        """Keyword arguments of `soft_embed` and `top_tokens` that give this model's logits."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def soft_embed(self, hidden: Tensor, **options: Any) -> Any:
        """The soft token of each hidden state, [..., D] -> [..., E] (docs/method.md §3); options: the other arguments
        of `gircse.ops.soft_embed`."""
        return soft_embed(
            hidden,
            self.head_weight,
            self.tied_or_table,
            embed_scale=self.embed_scale,
            **self.score_options(),
            **options,
        )

    def top_tokens(self, hidden: Tensor, n: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Ids and weights [..., n]; options: the other arguments of `gircse.ops.top_tokens`."""
        return top_tokens(hidden, self.head_weight, n, **self.score_options(), **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], as plain matrix product; for probes and explanations."""
        logits = self.logit_scale * nn.functional.linear(hidden, self.head_weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def vocabulary_layers(model: Any) -> tuple[nn.Module, nn.Module]:
    """The output head and the input embedding, with any adapter around them.

    Raises:
        UnsupportedModelError: one of them is missing, or the head has no weight.
    """
    name = type(model).__name__
    layers = [getattr(model, f"get_{kind}_embeddings", None) for kind in ("output", "input")]
    head, embedding = (layer() if callable(layer) else None for layer in layers)
    if head is None or embedding is None or getattr(base_layer(head), "weight", None) is None:
        raise UnsupportedModelError(f"{name} has no language-model head with a weight: load a causal LM")
    return head, embedding


def below_peft(model: Any) -> Any:
    """The transformers model below one of PEFT's wrappers (also a mixed one, which has no `get_base_model`)."""
    tuner = getattr(model, "base_model", None)
    if hasattr(tuner, "inject_adapter"):
        return tuner.model  # type: ignore[union-attr]
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_layer(layer: Any) -> Any:
    """The layer that an adapter wraps, or the trained copy that replaces it."""
    tokens = _token_adapter(layer)
    if tokens is not None:
        return base_layer(tokens.base_layer)
    copies = getattr(layer, "modules_to_save", None)
    if copies is not None:
        active = [name for name in getattr(layer, "active_adapters", []) if name in copies]
        chosen = copies[active[0]] if active and not layer.disable_adapters else layer.original_module
        return base_layer(chosen)
    return base_layer(layer.base_layer) if hasattr(layer, "base_layer") else layer


def text_config(model: Any) -> Any:
    """The config of the language model. A model of text and images has one for the text alone."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _weight(layer: Any, what: str) -> Tensor:
    """The weight that a layer computes with: W + scale * B A under LoRA, with the rows of trained tokens inserted."""
    tokens = _token_adapter(layer)
    if tokens is not None:  # PEFT trains single rows of the table
        apart = tokens.disable_adapters or tokens.merged
        return tokens.base_layer.weight if apart else tokens.get_merged_weights(tokens.active_adapters)
    if not hasattr(layer, "base_layer"):
        weight = base_layer(layer).weight
        kind = quantised(weight)
        if kind is not None:
            raise UnsupportedModelError(f"model: the {what} is {kind}, expected a plain matrix: {KEEP_PLAIN}")
        return weight
    weight = _weight(layer.base_layer, what)  # LoRA may wrap trained tokens
    if layer.disable_adapters or layer.merged:
        return weight
    tables = (getattr(layer, "lora_A", {}), getattr(layer, "lora_embedding_A", {}))
    for name in layer.active_adapters:
        if not any(name in table for table in tables):
            if any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names):
                raise _unsupported_adapter(what, f"a layer of {type(layer).__module__}")
            continue  # this adapter does not change this layer
        if name in layer.lora_variant:
            raise _unsupported_adapter(what, f"a variant of LoRA ({type(layer.lora_variant[name]).__name__})")
        if layer.lora_bias[name]:
            raise _unsupported_adapter(what, "LoRA with a bias")
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _token_adapter(layer: Any) -> Any:
    """PEFT's layer of trained tokens, which is the layer itself or, beside LoRA, inside its wrapper; else None."""
    return getattr(layer, "token_adapter", layer if hasattr(layer, "trainable_tokens_delta") else None)


def _unsupported_adapter(what: str, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model: an adapter changes the {what}: got {kind}, expected plain LoRA or a trained copy (modules_to_save); "
        "merge it first (merge_and_unload), or leave head and table out of its target modules"
    )


def _embed_scale(embedding: Any, dtype: torch.dtype) -> float:
    """Gemma multiplies by the scale rounded to the table's dtype: 55.4256 becomes 55.5 in bfloat16."""
    scale = getattr(embedding, "embed_scale", 1.0)
    mantissa, exponent = math.frexp(_number(scale) if isinstance(scale, Tensor) else float(scale))
    steps = 2 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * steps) / steps, exponent)


@torch.compiler.assume_constant_result
def _number(scale: Tensor) -> float:
    """The number in a buffer, read once, so that no later step waits for the device or is captured with a read."""
    if scale.is_meta:
        return 1.0
    if scale not in _numbers:
        _numbers[scale] = float(scale)
    return _numbers[scale]


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        return 1.0 / float(config.logits_scaling)
    scaled = getattr(config, "scale_decoder_outputs", None)
    if scaled is None and getattr(config, "model_type", "") in _SCALED_WHERE_TIED:
        scaled = config.tie_word_embeddings
    if scaled:
        return float(config.d_model) ** -0.5
    return float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
