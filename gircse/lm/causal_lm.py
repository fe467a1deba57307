"""What a rollout must know of a causal LM: its body, head, embedding table, scales, soft-cap, positions.

A fact that is wrong (a forgotten embedding scale, a layer between the last hidden state and the head) does not crash,
it quietly gives bad embeddings. So `CausalLM.from_model` checks every fact against the model itself on a few tokens and
refuses the model when one does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gircse import ops
from gircse.lm.attention import ATTENTION_NAME, AttentionPass, RolloutKV, no_mask
from gircse.lm.device import without_autocast
from gircse.lm.onednn import onednn_linears
from gircse.ops.head_facts import HeadFacts, base_layer, text_config, vocabulary_layers
from gircse.ops.module import PROBE_TOLERANCE

_PROBE_TOKENS = 6
_FAR = 1 << 17  # a position beyond every length that models are made for, where the config names none


class UnsupportedModelError(ValueError):
    """The model cannot be rolled out correctly; the message says which probe failed."""


@dataclass(frozen=True)
class CausalLM:
    """A causal LM taken apart.

    Head and table are looked at in every call: an adapter that is put on them, taken off or trained, a table that is
    replaced or resized count from the next call on (see `gircse.ops.head_facts`).

    Attributes:
        model: the whole `PreTrainedModel` (with LoRA layers in place, if any).
        body: its decoder without the head; returns the last hidden state after the final norm.
        max_positions: tokens and soft tokens of a text together, at most; None: no limit is known.
        attention_calls: of the rollout's attention function in a pass: one for each layer.
    """

    model: PreTrainedModel
    body: nn.Module
    max_positions: int | None = None
    attention_calls: int = 1

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> CausalLM:
        """Reads the facts from `model`, probes them, and switches the model to the rollout's attention function.

        Ordinary calls of the model keep working (they run SDPA).

        Raises:
            UnsupportedModelError: no body, head or embedding can be found, or a probe fails.
        """
        lm = cls(model=model, body=_body(model), max_positions=position_limit(text_config(model)))
        with without_autocast(lm.device):
            return replace(lm, attention_calls=lm._probe())

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self._table.device

    @property
    def hidden_size(self) -> int:
        return cast(Tensor, base_layer(vocabulary_layers(self.model)[0]).weight).shape[1]

    @property
    def vocabulary(self) -> int:
        """Token ids that there are."""
        return len(self._table)

    @property
    def _table(self) -> Tensor:
        """The weight of the embedding layer, without what an adapter adds."""
        return cast(Tensor, base_layer(vocabulary_layers(self.model)[1]).weight)

    def facts(self) -> HeadFacts:
        """What logits and embeddings are made of now.

        Raises:
            UnsupportedModelError: no head or table, or an adapter changes one of them in a way that no weight says.
        """
        try:
            return HeadFacts.of(self.model)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from None

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.facts().head_weight

    @property
    def embed_weight(self) -> Tensor:
        """[V, E]; the same tensor object as `head_weight` when the model ties them."""
        return self.facts().embed_weight

    def head_options(self, temperature: float | Tensor = 1.0) -> dict:
        """Keyword arguments of `ops.soft_embed` and `ops.top_tokens` that give this model's logits / temperature."""
        return {**self.facts().score_options(), "temperature": temperature}

    def soft_embed(
        self,
        hidden: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        return_stats: bool = False,
        facts: HeadFacts | None = None,
    ):
        """Soft token of each hidden state: [..., D] -> [..., E], what the embedding layer would give
        (docs/method.md §3).

        Args:
            facts: `facts()`, for a caller of many steps: with an adapter on head or table they are matrices of their
                own, which otherwise are made, and kept for backward, in every step.
        """
        facts = facts or self.facts()
        return ops.soft_embed(
            hidden,
            facts.head_weight,
            facts.tied_or_table,
            embed_scale=facts.embed_scale,
            return_stats=return_stats,
            temperature=temperature,
            **facts.score_options(),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], plainly; for probes and explanations, never for the rollout."""
        return self.facts().logits(hidden)

    def _probe(self) -> int:
        """-> `attention_calls`."""
        facts, was_training = self.facts(), self.model.training
        attention = self.config._attn_implementation
        self.model.eval()
        try:
            with torch.no_grad():
                ids = torch.linspace(0, len(facts.embed_weight) - 1, _PROBE_TOKENS, device=self.device).long()[None]
                self._probe_embedding(ids, facts)
                # eager is every model's own definition; older SDPA integrations drop Gemma 2's soft-cap without a word
                self.model.set_attn_implementation("eager")
                expected = self.body(input_ids=ids, use_cache=False).last_hidden_state
                theirs = self.model(input_ids=ids, use_cache=False).logits
                self._check("head_weight and its scale, bias and soft-cap", facts.logits(expected), theirs)
                self.model.set_attn_implementation(ATTENTION_NAME)
                calls = self._probe_rollout(ids, expected)
                self._probe_neighbour(ids, expected)
                attention = ATTENTION_NAME
                return calls
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a body raises that was not made for this
            raise UnsupportedModelError(
                f"{self._name} cannot be rolled out: a probe raised {type(error).__name__}: {error}"
            ) from error
        finally:
            self.model.set_attn_implementation(attention)  # a refused model keeps what it came with
            self.model.train(was_training)

    def _probe_embedding(self, ids: Tensor, facts: HeadFacts) -> None:
        one_hot = torch.nn.functional.one_hot(ids, len(facts.embed_weight)).to(facts.embed_weight.dtype)
        self._check(
            "embed_scale (one_hot @ embedding matrix)",
            facts.embed_scale * (one_hot @ facts.embed_weight),
            self.model.get_input_embeddings()(ids),
        )

    def _probe_rollout(self, ids: Tensor, expected: Tensor) -> int:
        """Two prompt tokens, then the rest one by one through the step pass, against the stock body's hidden states."""
        prompt = 2
        kv = RolloutKV(torch.full((1,), prompt, device=ids.device))
        states = [self.run_prompt(kv, ids[:, :prompt])]
        embeds = self.model.get_input_embeddings()(ids)
        states += [self.run_step(kv, t, embeds[:, prompt + t])[:, None] for t in range(ids.shape[1] - prompt)]
        self._check("the cached rollout (attention, positions)", torch.cat(states, dim=1), expected)
        return len(kv.prompt)

    def _probe_neighbour(self, ids: Tensor, expected: Tensor) -> None:
        """The same text beside another one at the last positions there are: rotary frequencies that follow the longest
        row of a batch would change it."""
        count = ids.shape[1]
        last = _FAR if self.max_positions is None else self.max_positions
        if last < count:
            return
        positions = torch.stack([torch.arange(count), torch.arange(last - count, last)]).to(ids.device)
        kv = RolloutKV(torch.full((2,), count, device=ids.device))
        states = self.run_body(kv.prompt_pass(), positions, input_ids=ids.expand(2, -1))
        self._check("a text beside a long one (positions)", states[:1], expected)

    def run_prompt(self, kv: RolloutKV, input_ids: Tensor) -> Tensor:
        """The prompt pass of the decoder body: token ids [B, N] -> last hidden states [B, N, D]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.run_body(kv.prompt_pass(), positions, input_ids=input_ids)

    def run_step(self, kv: RolloutKV, step: int, token: Tensor) -> Tensor:
        """One step pass: embeddings [B, D] of the tokens at position length + step -> last hidden states [B, D]."""
        positions = (kv.lengths + step)[:, None]
        return self.run_body(kv.step_pass(step), positions, inputs_embeds=token[:, None])[:, 0]

    def run_body(self, kv_pass: AttentionPass, position_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Any pass of the decoder body: `input_ids` [B, Q] or `inputs_embeds` [B, Q, D] at `position_ids` [B or 1, Q]
        -> last hidden states [B, Q, D]."""
        attention = text_config(self.model)._attn_implementation
        if attention != ATTENTION_NAME:
            raise _wrong_attention(attention)
        mask = no_mask(position_ids)
        kv_pass.calls = 0
        with onednn_linears(self.body, next(iter(inputs.values()))):
            output = self.body(
                attention_mask=mask, position_ids=position_ids, use_cache=False, return_dict=True, kv=kv_pass, **inputs
            )
        if kv_pass.calls < self.attention_calls:
            raise UnsupportedModelError(
                f"{self._name}: {kv_pass.calls} of {self.attention_calls} layers called the attention function "
                f"{ATTENTION_NAME!r} that is registered with transformers; the rollout needs it in all"
            )
        return output.last_hidden_state

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} (model_type {self.config.model_type!r})"

    def _check(self, fact: str, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape:
            raise UnsupportedModelError(
                f"{self._name}: probe of {fact} failed: got shape {tuple(ours.shape)}, "
                f"the model gives {tuple(theirs.shape)}"
            )
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
        tolerance = PROBE_TOLERANCE.get(theirs.dtype, 6e-2)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{self._name}: probe of {fact} failed: relative difference {error:.2e} to the model's own output, "
                f"expected <= {tolerance:.0e}"
            )


def _wrong_attention(got: str) -> ValueError:
    return ValueError(
        f"base: got the attention implementation {got!r}, expected {ATTENTION_NAME!r}, which carries the rollout's "
        f"keys and values (SDPA underneath): call set_attn_implementation({ATTENTION_NAME!r}) on it"
    )


def position_limit(config: Any) -> int | None:
    """`max_position_embeddings`, or less where the rotary frequencies change for texts beyond some length.

    Under "longrope" and "dynamic" they are one set for a whole call, chosen by its longest row, and chosen anew while a
    row grows: rows would change each other, and keys that are kept would belong to another set. Up to the original
    length there is one set for all; "linear", "yarn", "llama3" and "proportional" have one set anyhow.
    """
    whole = getattr(config, "max_position_embeddings", None)
    limits = [whole]
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in [parameters, *parameters.values()]:  # some models have one for each type of layer
        name = kind.get("rope_type", "") if isinstance(kind, dict) else ""
        if name == "longrope":
            original = kind.get("original_max_position_embeddings")
            limits.append(original or getattr(config, "original_max_position_embeddings", None))
        if "dynamic" in name and whole is not None:
            limits.append(whole - 1)  # what somebody's longer call left behind is put right below that
    return min((limit for limit in limits if limit is not None), default=None)


def _body(model: PreTrainedModel) -> nn.Module:
    if model.base_model is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder body (`base_model`) apart from its head")
    return model.base_model
