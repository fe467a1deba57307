"""`SoftEmbedding`: the soft tokens of a given model, whose head and embedding layer it reads in every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .head_facts import HeadFacts, below_peft
from .probe import probe_head_and_table
from .soft_embed import SoftTokenStats


class SoftEmbedding(nn.Module):
    """Turns hidden states of a model into soft tokens for the same model: mixtures of its embeddings.

    The module reads the model's head and embedding layer in every call and does not own them: it has no parameters and
    an empty `state_dict`, tied weights stay tied, and gradients arrive at the model's parameters. When the model is
    moved, cast or resized, or gets a LoRA adapter on head or table (`HeadFacts.of`), the next call follows. The module
    works under autograd and `torch.compile`.
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
            options: the arguments of `soft_embed` that do not depend on the model: all but the matrices, bias, scales
                and soft-cap.

        Raises:
            ValueError: an adapter changes head or table otherwise than by its weight; a ban by -inf where the model's
                soft-cap would lift it.
        """
        facts = self.facts
        if bias is not None:
            facts = facts._replace(bias=_with_bias(facts, bias))
        return facts.soft_embed(hidden, **options)

    def top_tokens(self, hidden: Tensor, n: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Ids and weights [..., n] of the tokens that a soft token is made of; options: those of `top_tokens` that do
        not depend on the model."""
        return self.facts.top_tokens(hidden, n, **options)

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
        probe: run a few tokens through the model and compare its own logits and embeddings with those that the facts
            give (`gircse.ops.probe`). False skips that.

    Raises:
        gircse.UnsupportedModelError (a ValueError): no head or embedding, an adapter on one of them other than plain
            LoRA, or a fact that does not hold.
    """
    inner = below_peft(model)
    soft = SoftEmbedding(inner)
    facts = soft.facts
    if probe:
        was_training = inner.training
        inner.eval()
        try:
            probe_head_and_table(inner, facts)
        finally:
            inner.train(was_training)
    return soft


def _with_bias(facts: HeadFacts, bias: Tensor) -> Tensor:
    if facts.softcap is not None:
        banned, reason = torch.isneginf(bias).any(), f"which the model's soft-cap of {facts.softcap} would lift"
        if torch.compiler.is_compiling():
            torch._assert_async(banned.logical_not(), f"bias: got -inf, {reason}")
        elif banned:
            raise ValueError(f"bias: got -inf, {reason}; expected finite numbers (ban tokens by token_bitmask instead)")
    return bias if facts.bias is None else facts.bias + bias
