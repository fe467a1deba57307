"""What a rollout must know of a causal LM: its body, head, embedding table, scales, soft-cap. All of it in this file.

A fact that is wrong (a forgotten embedding scale, a layer between the last hidden state and the head) does not crash,
it quietly gives bad embeddings. So `CausalLM.from_model` checks every fact against the model itself on a few tokens and
refuses the model when one does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gircse import ops
from gircse.attention import ATTENTION_NAME, AttentionPass, RolloutKV, no_mask
from gircse.cpu_linear import use_onednn
from gircse.device import without_autocast
from gircse.ops.module import PROBE_TOLERANCE, HeadFacts

_PROBE_TOKENS = 6


class UnsupportedModelError(ValueError):
    """The model cannot be rolled out correctly; the message says which probe failed."""


@dataclass(frozen=True)
class CausalLM:
    """A causal LM taken apart.

    Attributes:
        model: the whole `PreTrainedModel` (with LoRA layers in place, if any).
        body: its decoder without the head; returns the last hidden state after the final norm.
        embed_scale: what the embedding *layer* multiplies its rows by (Gemma: sqrt(D) in the table's dtype; else 1).
        logit_scale: factor on the head's output (Cohere `logit_scale`, Granite 1 / `logits_scaling`; else 1).
        softcap: `final_logit_softcapping` (Gemma 2) or None.
    """

    model: PreTrainedModel
    body: nn.Module
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> CausalLM:
        """Reads the facts from `model`, probes them, and switches the model to the rollout's attention function (and,
        for float32 on the CPU, to oneDNN's products).

        Ordinary calls of the model keep working (they run SDPA).

        Raises:
            UnsupportedModelError: no body, head or embedding can be found, or a probe fails.
        """
        facts = _facts(model)
        lm = cls(
            model=model,
            body=_body(model),
            embed_scale=facts.embed_scale,
            logit_scale=facts.logit_scale,
            softcap=facts.softcap,
        )
        use_onednn(model)
        with without_autocast(lm.device):
            lm._probe()
        return lm

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.embed_weight.device

    @property
    def hidden_size(self) -> int:
        return self.head_weight.shape[1]

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.model.get_output_embeddings().weight

    @property
    def embed_weight(self) -> Tensor:
        """[V, E]; the same tensor object as `head_weight` when the model ties them."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def head_options(self, temperature: float | Tensor = 1.0) -> dict:
        """Keyword arguments of `ops.soft_embed` and `ops.top_tokens` that give this model's logits / temperature."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "temperature": temperature}

    def soft_embed(self, hidden: Tensor, *, temperature: float | Tensor = 1.0, return_stats: bool = False):
        """Soft token of each hidden state: [..., D] -> [..., E], what the embedding layer would give (SPEC 1.2)."""
        head, embed = self.head_weight, self.embed_weight
        return ops.soft_embed(
            hidden,
            head,
            None if embed is head else embed,
            embed_scale=self.embed_scale,
            return_stats=return_stats,
            **self.head_options(temperature),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], plainly; for probes and explanations, never for the rollout."""
        logits = self.logit_scale * self.model.get_output_embeddings()(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _probe(self) -> None:
        vocab, was_training = self.embed_weight.shape[0], self.model.training
        attention = self.config._attn_implementation
        self.model.eval()
        try:
            with torch.no_grad():
                ids = torch.linspace(0, vocab - 1, _PROBE_TOKENS, device=self.device).long()[None]
                self._probe_embedding(ids)
                # eager is every model's own definition; older SDPA integrations drop Gemma 2's soft-cap without a word
                self.model.set_attn_implementation("eager")
                expected = self.body(input_ids=ids, use_cache=False).last_hidden_state
                theirs = self.model(input_ids=ids, use_cache=False).logits
                self._check("head_weight and its scale, bias and soft-cap", self.logits(expected), theirs)
                self.model.set_attn_implementation(ATTENTION_NAME)
                self._probe_rollout(ids, expected)
                attention = ATTENTION_NAME
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a body raises that was not made for this
            raise UnsupportedModelError(
                f"{self._name} cannot be rolled out: a probe raised {type(error).__name__}: {error}"
            ) from error
        finally:
            self.model.set_attn_implementation(attention)  # a refused model keeps what it came with
            self.model.train(was_training)

    def _probe_embedding(self, ids: Tensor) -> None:
        one_hot = torch.nn.functional.one_hot(ids, self.embed_weight.shape[0]).to(self.embed_weight.dtype)
        self._check(
            "embed_scale (one_hot @ embedding matrix)",
            self.embed_scale * (one_hot @ self.embed_weight),
            self.model.get_input_embeddings()(ids),
        )

    def _probe_rollout(self, ids: Tensor, expected: Tensor) -> None:
        """Two prompt tokens, then the rest one by one through the step pass, against the stock body's hidden states."""
        prompt = 2
        kv = RolloutKV(torch.full((1,), prompt, device=ids.device))
        states = [self.run_prompt(kv, ids[:, :prompt])]
        embeds = self.model.get_input_embeddings()(ids)
        states += [self.run_step(kv, t, embeds[:, prompt + t])[:, None] for t in range(ids.shape[1] - prompt)]
        if not kv.prompt:
            raise UnsupportedModelError(
                f"{self._name} does not call transformers' attention interface, which the cached rollout needs"
            )
        self._check("the cached rollout (attention, positions)", torch.cat(states, dim=1), expected)

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
        mask = no_mask(position_ids)
        output = self.body(attention_mask=mask, position_ids=position_ids, use_cache=False, kv=kv_pass, **inputs)
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


def _facts(model: PreTrainedModel) -> HeadFacts:
    try:
        return HeadFacts.of(model)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from None


def _body(model: PreTrainedModel) -> nn.Module:
    if model.base_model is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder body (`base_model`) apart from its head")
    return model.base_model
