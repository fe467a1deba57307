"""What a rollout must know of a causal LM: its body, its attention layers and its limit of positions.

A wrong fact, such as a forgotten embedding scale or a layer between the last hidden state and the head, does not crash;
it quietly gives bad embeddings. So `CausalLM.from_model` compares every fact with the model itself on a few tokens and
refuses the model when one does not hold. The facts of head and table are those of `gircse.ops.head_facts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gircse.lm.attention import ATTENTION_NAME, AttentionPass, RolloutKV, no_mask
from gircse.lm.device import without_autocast
from gircse.lm.onednn import onednn_linears
from gircse.ops.head_facts import HeadFacts, UnsupportedModelError, base_layer, text_config, vocabulary_layers
from gircse.ops.probe import check_probe, probe_head_and_table, probe_tokens

__all__ = ["CausalLM", "UnsupportedModelError", "position_limit"]

_FAR = 1 << 17  # a position beyond the length of every known model, for configs that name no limit


@dataclass(frozen=True)
class CausalLM:
    """A causal LM taken apart.

    Head and table are read in every call, so that an adapter on them and a table of another size count from the next
    call on.

    Attributes:
        model: the whole `PreTrainedModel` (with LoRA layers in place, if any).
        body: its decoder without the head; returns the last hidden state after the final norm.
        max_positions: tokens and soft tokens of a text together, at most; None: no limit is known.
        attention_calls: calls of the rollout's attention function in a pass: one for each layer.
    """

    model: PreTrainedModel
    body: nn.Module
    max_positions: int | None = None
    attention_calls: int = 1

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> CausalLM:
        """Reads the facts from `model`, probes them, and switches the model to the rollout's attention function.

        Ordinary calls of the model keep working; they run SDPA.

        Raises:
            UnsupportedModelError: the model has no body, head or embedding, or a probe fails.
        """
        if model.base_model is model:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no decoder body (`base_model`) apart from its head"
            )
        lm = cls(model=model, body=model.base_model, max_positions=position_limit(text_config(model)))
        with without_autocast(lm.device):
            return replace(lm, attention_calls=lm._probe())

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self._table.device

    @property
    def hidden_size(self) -> int:
        return cast(Tensor, base_layer(vocabulary_layers(self.model)[0]).weight).shape[1]

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the embedding table has a row for."""
        return len(self._table)

    @property
    def _table(self) -> Tensor:
        """The weight of the embedding layer, without what an adapter adds."""
        return cast(Tensor, base_layer(vocabulary_layers(self.model)[1]).weight)

    def facts(self) -> HeadFacts:
        """What logits and embeddings are made of now.

        Raises:
            UnsupportedModelError: there is no head or table, or an adapter changes one of them otherwise than by its
                weight.
        """
        return HeadFacts.of(self.model)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.facts().head_weight

    @property
    def embed_weight(self) -> Tensor:
        """[V, E]; the same tensor object as `head_weight` when the model ties them."""
        return self.facts().embed_weight

    def soft_embed(self, hidden: Tensor, *, facts: HeadFacts | None = None, **options: Any) -> Any:
        """`HeadFacts.soft_embed` of hidden states [..., D] -> [..., E].

        Args:
            facts: `facts()`, for a caller of many steps. An adapter on head or table makes new matrices in each call of
                it, which every step would keep for backward.
        """
        return (facts or self.facts()).soft_embed(hidden, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], as plain matrix product; for probes and explanations."""
        return self.facts().logits(hidden)

    def _probe(self) -> int:
        """-> `attention_calls`."""
        facts, was_training, attention = self.facts(), self.model.training, self.config._attn_implementation
        self.model.eval()
        try:
            # The eager attention is the definition; the SDPA of older transformers omits Gemma 2's soft-cap silently.
            self.model.set_attn_implementation("eager")
            expected = probe_head_and_table(self.model, facts)
            ids = probe_tokens(self.model, facts)
            self.model.set_attn_implementation(ATTENTION_NAME)
            with torch.no_grad():
                calls = self._probe_rollout(ids, expected)
                self._probe_neighbour(ids, expected)
            attention = ATTENTION_NAME
            return calls
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # A body that is not made for a rollout may raise anything.
            raise UnsupportedModelError(
                f"{self._name} cannot be rolled out: a probe raised {type(error).__name__}: {error}"
            ) from error
        finally:
            self.model.set_attn_implementation(attention)  # a refused model keeps the one that it came with
            self.model.train(was_training)

    def _probe_rollout(self, ids: Tensor, expected: Tensor) -> int:
        """Compares two prompt tokens and the rest, one step pass each, with the stock body's hidden states."""
        prompt = 2
        kv = RolloutKV(torch.full((1,), prompt, device=ids.device))
        states = [self.run_prompt(kv, ids[:, :prompt])]
        embeds = self.model.get_input_embeddings()(ids)
        states += [self.run_step(kv, t, embeds[:, prompt + t])[:, None] for t in range(ids.shape[1] - prompt)]
        check_probe(self.model, "the cached rollout (attention, positions)", torch.cat(states, dim=1), expected)
        return len(kv.prompt)

    def _probe_neighbour(self, ids: Tensor, expected: Tensor) -> None:
        """Runs the text beside another one at the last positions that are allowed. Rotary frequencies that follow the
        longest row of a batch would change the states of the first."""
        count = ids.shape[1]
        last = _FAR if self.max_positions is None else self.max_positions
        if last < count:
            return
        positions = torch.stack([torch.arange(count), torch.arange(last - count, last)]).to(ids.device)
        kv = RolloutKV(torch.full((2,), count, device=ids.device))
        states = self.run_body(kv.prompt_pass(), positions, input_ids=ids.expand(2, -1))
        check_probe(self.model, "a text beside a long one (positions)", states[:1], expected)

    def run_prompt(self, kv: RolloutKV, input_ids: Tensor) -> Tensor:
        """The prompt pass of the decoder body: token ids [B, N] -> last hidden states [B, N, D]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.run_body(kv.prompt_pass(), positions, input_ids=input_ids)

    def run_step(self, kv: RolloutKV, step: int, token: Tensor) -> Tensor:
        """One step pass: embeddings [B, D] of the tokens at position length + step -> last hidden states [B, D]."""
        return self._run_steps(kv, step, token[:, None])[:, 0]

    def run_block(self, kv: RolloutKV, tokens: Tensor) -> Tensor:
        """All K steps in one pass: embeddings [B, K, D] of the tokens at positions length + 0..K-1 -> last hidden
        states [B, K, D]."""
        return self._run_steps(kv, 0, tokens)

    def _run_steps(self, kv: RolloutKV, step: int, tokens: Tensor) -> Tensor:
        positions = kv.lengths[:, None] + torch.arange(step, step + tokens.shape[1], device=kv.lengths.device)
        return self.run_body(kv.step_pass(step), positions, inputs_embeds=tokens)

    def run_body(self, kv_pass: AttentionPass, position_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Any pass of the decoder body: `input_ids` [B, Q] or `inputs_embeds` [B, Q, D] at `position_ids` [B or 1, Q]
        -> last hidden states [B, Q, D].

        Raises:
            ValueError: another attention function was set on the model or on some of its layers since.
        """
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


def _wrong_attention(got: str) -> ValueError:
    return ValueError(
        f"base: got the attention implementation {got!r}, expected {ATTENTION_NAME!r}, which carries the rollout's "
        f"keys and values (SDPA underneath): call set_attn_implementation({ATTENTION_NAME!r}) on it"
    )


def position_limit(config: Any) -> int | None:
    """`max_position_embeddings`, or less where the rotary frequencies change for texts beyond some length.

    "longrope" and "dynamic" choose one set of frequencies for a whole call by its longest row, and choose again while a
    row grows. Rows would change each other, and cached keys would belong to another set. Up to the original length
    there is one set for all. "linear", "yarn", "llama3" and "proportional" have one set at every length.
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
            limits.append(whole - 1)  # below it, transformers restores the frequencies after a longer call
    return min((limit for limit in limits if limit is not None), default=None)
