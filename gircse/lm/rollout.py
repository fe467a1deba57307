"""The differentiable rollout: the prompt once, then K soft tokens on its keys and values (docs/method.md §3).

The reference runs the whole sequence again for every step. Here the prompt is encoded once; step k costs one position
per row, and gradients flow through the kept keys and values: loss and gradients are those of the uncached computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gircse.lm.attention import RolloutKV
from gircse.lm.causal_lm import CausalLM


class Rollout(NamedTuple):
    """Hidden states of a rollout, in the model's dtype.

    Attributes:
        prompt: h_0 [B, D], the state at the last prompt token.
        steps: g_1..g_K [B, K, D].
    """

    prompt: Tensor
    steps: Tensor

    @property
    def with_prompt(self) -> Tensor:
        """h_0, g_1..g_K [B, K + 1, D]."""
        return torch.cat([self.prompt[:, None], self.steps], dim=1)


class RolloutObserver(Protocol):
    """Whoever wants to know how a rollout goes (`gircse.train.step_monitor`)."""

    def enter(self, phase: str) -> None:
        """Called where the "prompt" pass and the "steps" begin, in forward and again in backward."""

    def soft_token(self, step: int, entropy: Tensor) -> None:
        """The entropies [B] of the soft tokens of step 0..K-1, in nats, without gradient; in passes with autograd, of
        which gradient caching makes one for each text."""


def rollout(
    lm: CausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_steps: int,
    *,
    temperature: float | Tensor = 1.0,
    observer: RolloutObserver | None = None,
) -> Rollout:
    """Encodes the prompts and generates `num_steps` soft tokens for each.

    Args:
        lm: the model, taken apart by `CausalLM.from_model`.
        input_ids: [B, N] integer token ids; padding may stand anywhere, left or right.
        attention_mask: [B, N], nonzero at real tokens; every row has at least one.
        num_steps: K >= 0.
        temperature: logit temperature T of the soft tokens, a float or a tensor that broadcasts to [B].
        observer: is told when the phases begin and how certain the soft tokens are; changes no result.

    Differentiable in every parameter of the model. With activation checkpointing switched on in the model
    (`gradient_checkpointing_enable`, non-reentrant) the prompt pass is checkpointed, the K short steps are not.
    """
    if observer is not None:
        observer.enter("prompt")
    input_ids, lengths = _pad_right(input_ids, attention_mask)
    kv = RolloutKV(lengths)
    states = lm.run_prompt(kv, input_ids)
    prompt = hidden = states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    steps, facts = [], lm.facts()
    if observer is not None:
        observer.enter("steps")
    with _no_checkpointing(lm.body):
        for t in range(num_steps):
            if observer is None or not torch.is_grad_enabled():
                token = lm.soft_embed(hidden, temperature=temperature, facts=facts)
            else:
                token, stats = lm.soft_embed(hidden, temperature=temperature, return_stats=True, facts=facts)
                observer.soft_token(t, stats.entropy.detach())
            hidden = lm.run_step(kv, t, token)
            steps.append(hidden)
    result = Rollout(
        prompt, torch.stack(steps, dim=1) if steps else prompt.new_empty(prompt.shape[0], 0, prompt.shape[1])
    )
    if observer is not None:
        _observe_backward(result, observer)
    return result


def _observe_backward(states: Rollout, observer: RolloutObserver) -> None:
    """Backward goes through the steps first, then through the prompt pass; a hook on a tensor runs in between."""
    for phase, tensor in (("steps", states.steps), ("prompt", states.prompt)):
        if tensor.requires_grad:
            tensor.register_hook(lambda _, phase=phase: observer.enter(phase))


def _pad_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's real tokens to the front, in order: -> ids [B, N], lengths [B]. No host synchronisation."""
    real = attention_mask.to(input_ids.device) != 0
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), real.sum(dim=1)


@contextmanager
def _no_checkpointing(body: nn.Module) -> Iterator[None]:
    """Switches layer checkpointing off inside: a step's activations are one position, not worth a second forward."""
    layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
