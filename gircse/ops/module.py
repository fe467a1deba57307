"""`SoftEmbedding`: the soft tokens of a given model, which knows the facts about its head and embedding layer.

The facts are read from the model's own layers and config by name, so that nothing here needs to know the library or
the class that the model is of. `gircse.architecture` reads the same facts here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .soft_embed import SoftTokenStats, soft_embed
from .top_tokens import top_tokens

# Relative error ||ours - theirs|| / ||theirs|| that rounding explains; a wrong fact is off by far more.
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_PROBE_TOKENS = 6


class HeadFacts(NamedTuple):
    """How a causal LM turns a hidden state into logits, and a token into its embedding.

    ``logits = softcap(logit_scale * head(hidden))``, ``embedding(v) = embed_scale * embed_weight[v]``.
    """

    head: nn.Module  # its `weight` [V, D], and `bias` [V] where it has one
    embedding: nn.Module  # its `weight` [V, E]; the same parameter where the model ties them
    embed_scale: float = 1.0  # Gemma: sqrt(D) in the table's dtype
    logit_scale: float = 1.0  # Cohere's `logit_scale`, Granite's 1 / `logits_scaling`
    softcap: float | None = None  # Gemma 2's `final_logit_softcapping`

    @classmethod
    def of(cls, model: Any) -> HeadFacts:
        """The facts of a causal LM (`get_input_embeddings`, `get_output_embeddings`, `config`), unchecked.

        Raises:
            ValueError: there is no head or embedding with a weight, or an adapter changes one of them.
        """
        name = type(model).__name__
        head, embedding = (
            layer() if callable(layer) else None
            for layer in (getattr(model, f"get_{kind}_embeddings", None) for kind in ("output", "input"))
        )
        if head is None or getattr(head, "weight", None) is None or embedding is None:
            raise ValueError(f"{name} has no language-model head with a weight: load a causal LM")
        for kind, layer in (("output head", head), ("input embedding", embedding)):
            if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
                raise ValueError(
                    f"an adapter changes the {kind} of {name}; merge it first (merge_and_unload), "
                    "or leave the head and embedding out of the adapter's target modules"
                )
        config = model.config
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(head, embedding, _embed_scale(embedding), _logit_scale(config), softcap)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.head.weight  # type: ignore[return-value]

    @property
    def embed_weight(self) -> Tensor:
        """[V, E]; the same tensor object as `head_weight` when the model ties them."""
        return self.embedding.weight  # type: ignore[return-value]

    def score_options(self) -> dict[str, Any]:
        """Keyword arguments of `soft_embed` and `top_tokens` that give this model's logits."""
        bias = getattr(self.head, "bias", None)
        return {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], plainly; for probes and explanations."""
        logits = self.logit_scale * self.head(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class SoftEmbedding(nn.Module):
    """Hidden states of a model to soft tokens for the same model, what its embedding layer would give.

    Holds the model's head and embedding layer without owning them: no parameters of its own, an empty `state_dict`,
    tied weights stay tied, and gradients arrive at the model's parameters. It follows the model to another device or
    dtype. Works under autograd and `torch.compile`.
    """

    def __init__(self, facts: HeadFacts) -> None:
        super().__init__()
        self._facts = facts  # a tuple: layers in it do not become submodules

    @property
    def facts(self) -> HeadFacts:
        return self._facts

    def forward(self, hidden: Tensor, **options: Any) -> Tensor | tuple[Tensor, SoftTokenStats]:
        """Soft tokens [..., E] of hidden [..., D], in its dtype.

        Args:
            hidden: last hidden states, after the model's final norm.
            options: the arguments of `soft_embed` that belong to no model: temperature, top_k, top_p, min_p,
                gumbel_seed, gumbel_temperature, hard, return_stats, backend.
        """
        facts = self._facts
        head, embed = facts.head_weight, facts.embed_weight
        tied = None if embed is head else embed
        return soft_embed(hidden, head, tied, embed_scale=facts.embed_scale, **facts.score_options(), **options)

    def top_tokens(self, hidden: Tensor, n: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Ids and probabilities [..., n] of the most probable tokens; options: temperature, backend."""
        return top_tokens(hidden, self._facts.head_weight, n, **self._facts.score_options(), **options)

    def extra_repr(self) -> str:
        facts = self._facts
        (vocab, width), tied = facts.head_weight.shape, facts.embed_weight is facts.head_weight
        return (
            f"vocab={vocab}, hidden={width}, embedding={facts.embed_weight.shape[1]}, tied={tied}, "
            f"embed_scale={facts.embed_scale:g}, logit_scale={facts.logit_scale:g}, softcap={facts.softcap}"
        )


def from_model(model: Any, *, probe: bool = True) -> SoftEmbedding:
    """The soft tokens of a causal LM of transformers, also under a PEFT adapter.

    Args:
        model: a `PreTrainedModel` with a language-model head, or a `peft.PeftModel` around one whose adapter leaves
            head and embedding alone. It is not changed.
        probe: run a few tokens through the model and compare its own logits and embeddings with the facts that were
            found. A forgotten scale does not crash, it quietly gives wrong soft tokens.

    Raises:
        ValueError: no head or embedding, an adapter on one of them, or a fact that does not hold.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    facts = HeadFacts.of(inner)
    if probe:
        _probe(inner, facts)
    return SoftEmbedding(facts)


@torch.no_grad()
def _probe(model: Any, facts: HeadFacts) -> None:
    weight, was_training = facts.embed_weight, model.training
    ids = torch.linspace(0, weight.shape[0] - 1, _PROBE_TOKENS, device=weight.device).long()[None]
    body = model.base_model
    model.eval()
    try:
        _check(model, "embed_scale", facts.embed_scale * weight[ids], facts.embedding(ids))
        if body is not model:
            states = body(input_ids=ids, use_cache=False).last_hidden_state
            theirs = model(input_ids=ids, use_cache=False).logits
            _check(model, "the head's weight, bias, logit_scale and softcap", facts.logits(states), theirs)
    finally:
        model.train(was_training)


def _check(model: Any, fact: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
    tolerance = PROBE_TOLERANCE.get(theirs.dtype, 6e-2)
    if not error <= tolerance:
        raise ValueError(
            f"model: the probe of {fact} failed on {type(model).__name__}: relative difference {error:.2e} to its own "
            f"output, expected <= {tolerance:.0e}"
        )


def _embed_scale(embedding: nn.Module) -> float:
    scale = getattr(embedding, "embed_scale", 1.0)
    # Gemma multiplies by the scale rounded to the table's dtype (55.4256 becomes 55.5 in bfloat16)
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))  # type: ignore[arg-type]


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
