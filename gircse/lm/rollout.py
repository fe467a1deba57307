"""The differentiable rollout: the prompt is encoded once, then K soft tokens follow on its keys and values
(docs/method.md §3).

The paper's code runs the whole sequence again for every step. Here step k costs one position per row, and gradients
flow through the kept keys and values, so that loss and gradients are those of the uncached computation.

Where soft tokens are constants in backward (`soft_token_gradient=0`), nothing but their values is sequential, and the
steps go *by the block*: the tokens are drafted without autograd on the prompt's detached keys and values, and then all
K positions go through the decoder in one differentiable pass. States and gradients are those of one step after the
other with detached tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gircse.lm.attention import RolloutKV
from gircse.lm.causal_lm import CausalLM
from gircse.ops.arguments import check_number


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
    """Is told about the progress of a rollout (`gircse.train.step_monitor`)."""

    def enter(self, phase: str) -> None:
        """Called when the "prompt" pass and the "steps" begin, in forward and again in backward."""

    def soft_token(self, step: int, entropy: Tensor) -> None:
        """Called with the entropies [B] of the soft tokens of step 0..K-1, in nats, detached: in passes with autograd,
        and wherever tokens are drafted. Gradient caching makes one such pass for each text."""


class Drafter(Protocol):
    """Makes the soft tokens of a rollout by the block. `draft` does it by definition; a caller may hand in another."""

    def __call__(
        self,
        lm: CausalLM,
        kv: RolloutKV,
        prompt: Tensor,
        num_steps: int,
        *,
        temperature: float | Tensor = 1.0,
        observer: RolloutObserver | None = None,
    ) -> Tensor:
        """The prompts' keys and values and h_0 [B, D], without autograd -> the tokens d_1..d_K [B, K, E]. It draws no
        random numbers."""


def rollout(
    lm: CausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_steps: int,
    *,
    temperature: float | Tensor = 1.0,
    soft_token_gradient: float = 1.0,
    drafter: Drafter | None = None,
    observer: RolloutObserver | None = None,
) -> Rollout:
    """Encodes the prompts and generates `num_steps` soft tokens for each.

    Args:
        lm: the model, taken apart by `CausalLM.from_model`.
        input_ids: [B, N] integer token ids; padding may be anywhere in a row.
        attention_mask: [B, N], nonzero at real tokens; every row has at least one.
        num_steps: K >= 0.
        temperature: logit temperature T of the soft tokens, a float or a tensor that broadcasts to [B].
        soft_token_gradient: in [0, 1], multiplies the gradient of every soft token. 1 is the paper's method. With 0 the
            steps go by the block; then a part of the model that only soft tokens reach, such as an untied head, gets no
            gradient.
        drafter: makes the tokens of a rollout by the block; default: `draft`, one after the other.
        observer: is told when the phases begin and how certain the soft tokens are; changes no result.

    The result is differentiable in every parameter of the model. With activation checkpointing switched on in the model
    (`gradient_checkpointing_enable`, non-reentrant) the prompt pass and the block are checkpointed; single steps are
    not. In training mode dropout falls on the prompt pass and on single steps or the block. The draft is made without
    dropout, so that it is what the model would say.

    Raises:
        TypeError: `soft_token_gradient` is no number. ValueError: it is out of range, or the drafter made another
            number of tokens.
    """
    if not 0 <= check_number("soft_token_gradient", soft_token_gradient) <= 1:
        raise ValueError(f"soft_token_gradient: got {soft_token_gradient!r}, expected a number from 0 to 1")
    if observer is not None:
        observer.enter("prompt")
    input_ids, lengths = _pad_right(input_ids, attention_mask)
    kv = RolloutKV(lengths)
    states = lm.run_prompt(kv, input_ids)
    prompt = states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    if observer is not None:
        observer.enter("steps")
    if num_steps == 0:
        steps = prompt.new_empty(prompt.shape[0], 0, prompt.shape[1])
    elif soft_token_gradient == 0:
        drafter = drafter or draft
        tokens = drafter(lm, kv.detached(), prompt.detach(), num_steps, temperature=temperature, observer=observer)
        if tokens.shape[:2] != (len(lengths), num_steps):
            got = tuple(tokens.shape)
            raise ValueError(
                f"drafter: got tokens of shape {got}, expected {num_steps} for each of {len(lengths)} texts"
            )
        steps = lm.run_block(kv, tokens.detach())
        if _is_sharded(lm.body):
            steps = steps + 0 * prompt[:, None]
    else:
        watching = observer if torch.is_grad_enabled() else None
        next_token, hidden, each = _next_token(lm, temperature, watching), prompt, []
        # the activations of one position are not worth a second forward
        with _switched_off(lm.body, "gradient_checkpointing"):
            for t in range(num_steps):
                token = next_token(t, hidden)
                if soft_token_gradient != 1 and token.requires_grad:
                    token.register_hook(partial(torch.mul, other=soft_token_gradient))
                hidden = lm.run_step(kv, t, token)
                each.append(hidden)
        steps = torch.stack(each, dim=1)
    if observer is not None:
        # backward enters the prompt pass at h_0, and by the block at the keys of its last layer
        _observe_backward(observer, steps=[steps], prompt=[prompt, kv.prompt[max(kv.prompt)][0]])
    return Rollout(prompt, steps)


@torch.no_grad()
def draft(
    lm: CausalLM,
    kv: RolloutKV,
    prompt: Tensor,
    num_steps: int,
    *,
    temperature: float | Tensor = 1.0,
    observer: RolloutObserver | None = None,
) -> Tensor:
    """The soft tokens d_1..d_K [B, K, E], one after the other, without dropout (a `Drafter`)."""
    next_token, hidden, tokens = _next_token(lm, temperature, observer), prompt, []
    with without_dropout(lm.body):
        for t in range(num_steps):
            tokens.append(next_token(t, hidden))
            if t + 1 < num_steps:
                hidden = lm.run_step(kv, t, tokens[-1])
    return torch.stack(tokens, dim=1)


class KeptDraft:
    """A `Drafter` that drafts in its first call and gives the same tokens in all others: the two passes of gradient
    caching must run on the same tokens, and the second need not make them again.

    Args:
        drafter: makes them; default: `draft`.
    """

    def __init__(self, drafter: Drafter | None = None) -> None:
        self._drafter = drafter
        self._tokens: dict[torch.device, Tensor] = {}  # `DataParallel` calls it on each device with other texts

    @property
    def made(self) -> bool:
        """Whether it has drafted."""
        return bool(self._tokens)

    def __call__(self, lm: CausalLM, kv: RolloutKV, prompt: Tensor, num_steps: int, **options: Any) -> Tensor:
        if prompt.device not in self._tokens:
            self._tokens[prompt.device] = (self._drafter or draft)(lm, kv, prompt, num_steps, **options)
        return self._tokens[prompt.device]


def _next_token(
    lm: CausalLM, temperature: float | Tensor, observer: RolloutObserver | None
) -> Callable[[int, Tensor], Tensor]:
    """-> the function of a step t and its hidden states [B, D] that gives the soft tokens [B, E]."""
    facts = lm.facts()

    def next_token(t: int, hidden: Tensor) -> Tensor:
        if observer is None:
            return lm.soft_embed(hidden, temperature=temperature, facts=facts)
        token, stats = lm.soft_embed(hidden, temperature=temperature, return_stats=True, facts=facts)
        observer.soft_token(t, stats.entropy.detach())
        return token

    return next_token


def _is_sharded(body: nn.Module) -> bool:
    """Whether FSDP2 shares its layers out. It gathers a layer in backward when a gradient reaches the layer's output,
    and by the block none would reach that of the prompt pass, whose keys and values have gradients all the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(body, FSDPModule)


def _observe_backward(observer: RolloutObserver, **entries: list[Tensor]) -> None:
    """Registers hooks that report the phases of backward, which goes through the steps and then the prompt pass.

    Args:
        entries: for each phase the tensors at which backward enters it.
    """
    for phase, tensors in entries.items():
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda _, phase=phase: observer.enter(phase))


def _pad_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's real tokens to the front, in order: -> ids [B, N], lengths [B]. No host synchronisation."""
    real = attention_mask.to(input_ids.device) != 0
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), real.sum(dim=1)


def without_dropout(body: nn.Module) -> AbstractContextManager[None]:
    """Inside, the body is in eval mode."""
    return _switched_off(body, "training")


@contextmanager
def _switched_off(body: nn.Module, flag: str) -> Iterator[None]:
    """Sets a flag of all its modules that have it on to False inside."""
    modules = [module for module in body.modules() if getattr(module, flag, False)]
    for module in modules:
        setattr(module, flag, False)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, flag, True)
