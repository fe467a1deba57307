"""The attention of a rollout: the prompt is encoded once, then each soft token attends to the kept keys and values.

`transformers` passes every extra keyword of a decoder body's call on to the attention function. So one object per pass,
an `AttentionPass`, carries all state: the module keeps nothing, no `Cache` is involved, and the model builds no mask. A
rollout has `RolloutKV.prompt_pass()` and `RolloutKV.step_pass(t)`; `gircse.engine` has a packed prefill and a static
decoding pass. Shapes: B rows, H query and H_kv key heads, N prompt slots.

    prompt pass   q, k, v [B, H|H_kv, N, d]   causal attention within the prompt; k and v are kept, contiguous, once
    step pass t   q, k, v [B, H|H_kv, Q, d]   steps t+1..t+Q, one softmax over [prompt N | steps 1..t+Q] for each: the
                                              prompt's k and v are never copied, the few generated ones are concatenated

Rows are padded on the *right*, so the causal mask alone hides the padding from every real token and SDPA needs no other
mask. A step masks the slots beyond its row's length. Slot j holds position j; step t has position length + t.

Autograd records everything. Non-reentrant activation checkpointing replays a pass in backward; the replay finds its
entries already written and leaves them alone. Re-entrant checkpointing runs layers without autograd, which would
silently cut the gradient through keys and values, so it is refused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION_NAME = "gircse"


class RolloutKV:
    """Keys and values of one rollout, per layer index.

    Args:
        lengths: [B] int64, number of prompt tokens of each row (>= 1), on the model's device.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.differentiable = torch.is_grad_enabled()
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self.steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def prompt_pass(self) -> PromptPass:
        return PromptPass(self)

    def step_pass(self, step: int) -> StepPass:
        return StepPass(self, step)

    @torch.no_grad()
    def detached(self) -> RolloutKV:
        """The same prompts, without autograd, and no step yet."""
        kv = RolloutKV(self.lengths)
        kv.prompt = {layer: (key.detach(), value.detach()) for layer, (key, value) in self.prompt.items()}
        return kv


class AttentionPass:
    """One forward call of the decoder body: what its attention layers attend to, and where they keep keys and values.

    Attributes:
        differentiable: whether a backward pass will follow; then layers must not run without autograd.
        calls: calls of the attention function so far. `CausalLM.run_body` sets it to 0 and reads it afterwards.
    """

    differentiable = False
    calls = 0

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        dropout: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """[B, H, Q, d] queries and [B, H_kv, Q, d] keys and values of this pass -> [B, H, Q, d_v]."""
        raise NotImplementedError


class _RolloutPass(AttentionPass):
    """Builds each mask once, for all layers of one window size."""

    def __init__(self, kv: RolloutKV) -> None:
        self.kv = kv
        self.differentiable = kv.differentiable
        self._masks: dict[Any, Any] = {}


class PromptPass(_RolloutPass):
    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        key, value = key.contiguous(), value.contiguous()
        self.kv.prompt.setdefault(layer, (key, value))  # a checkpoint's replay keeps the first ones
        slots = key.shape[2]
        window = window if window is not None and window < slots else None
        if window not in self._masks:
            self._masks[window] = None if window is None else causal_band(slots, window=window, device=key.device)
        return causal_attention(
            query, key, value, mask=self._masks[window], scaling=scaling, dropout=dropout, softcap=softcap
        )


class StepPass(_RolloutPass):
    """One step of the rollout, or all of them by the block.

    Args:
        step: that of the first query, from 0. A query sees the steps up to its own.
    """

    def __init__(self, kv: RolloutKV, step: int) -> None:
        super().__init__(kv)
        self.step = step

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        prompt_key, prompt_value = self.kv.prompt[layer]
        earlier = self.kv.steps.setdefault(layer, [])
        if len(earlier) == self.step:  # false in a checkpoint's replay, whose entry is there
            earlier.append((key, value))
        if self.step:
            key = torch.cat([k for k, _ in earlier[: self.step]] + [key], dim=2)
            value = torch.cat([v for _, v in earlier[: self.step]] + [value], dim=2)

        batch, heads, queries, _ = query.shape
        kv_heads, slots = prompt_key.shape[1:3]
        hidden = self._hidden(window, kv_heads, heads // kv_heads, queries, slots, query)
        query = query.reshape(batch * kv_heads, -1, query.shape[3])  # heads that share keys, in one product
        keys = [part.flatten(0, 1).transpose(1, 2) for part in (prompt_key, key)]
        if softcap is None:
            biases = hidden.tensor_split((slots,), dim=-1)
            scores = [torch.baddbmm(bias, query, part, alpha=scaling) for bias, part in zip(biases, keys, strict=True)]
            together = torch.cat(scores, dim=-1)
        else:
            scores = [torch.bmm(query, part) for part in keys]
            together = softcap * torch.tanh(torch.cat(scores, dim=-1) * (scaling / softcap)) + hidden
        # In half precision softmax computes in float32 and rounds once, as in every stock implementation.
        probs = together.softmax(-1)
        probs = F.dropout(probs, dropout) if dropout else probs
        of_prompt, of_steps = probs.split((slots, probs.shape[-1] - slots), dim=-1)
        out = torch.baddbmm(torch.bmm(of_prompt, prompt_value.flatten(0, 1)), of_steps, value.flatten(0, 1))
        return out.view(batch, heads, queries, value.shape[-1])

    def _hidden(self, window: int | None, kv_heads: int, groups: int, queries: int, slots: int, like: Tensor) -> Tensor:
        """[B * kv_heads, groups * queries, slots + steps] in the dtype of `like`: -inf where a query must not attend,
        else 0."""
        key = window, kv_heads, groups
        if key not in self._masks:
            mask = self._mask(queries, slots, window).expand(-1, kv_heads, groups, -1, -1)
            hidden = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask, float("-inf"))
            self._masks[key] = hidden.view(-1, groups * queries, mask.shape[-1])
        return self._masks[key]

    def _mask(self, queries: int, slots: int, window: int | None) -> Tensor:
        """[B, 1, 1, queries, slots + steps], True where a query must not attend."""
        lengths = self.kv.lengths[:, None, None]
        slot = torch.arange(slots, device=lengths.device)
        step = torch.arange(self.step + queries, device=lengths.device)
        own = step[self.step :, None]
        hidden, generated = slot >= lengths, step > own
        if window is not None:  # a key at distance >= window is hidden
            hidden = hidden | (lengths + own - slot >= window)
            generated = generated | (own - step >= window)
        parts = (hidden.expand(-1, queries, -1), generated.expand(len(lengths), -1, -1))
        return torch.cat(parts, dim=-1)[:, None, None]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Causal grouped-query attention.

    SDPA computes it, except with a logit soft-cap (Gemma 2), which takes plain matrix products.

    Args:
        query, key, value: [B, H, Q, d], [B, H_kv, S, d], [B, H_kv, S, d_v].
        mask: bool, True = visible, [B, H, Q, S] or broadcastable; replaces the causal mask.
    """
    groups = query.shape[1] // key.shape[1]
    if softcap is None and mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=groups > 1
        )
    if softcap is None and query.device.type == "cpu":  # on CUDA a kernel takes either a mask or grouped heads
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    if mask is None:
        mask = causal_band(query.shape[2], key.shape[2] - query.shape[2], device=key.device)
    scores = softcap * torch.tanh((query * scaling) @ key.transpose(-1, -2) / softcap)
    # Not -inf: in an ordinary call the rows of left padding see no slot, and their NaN would spread.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (F.dropout(probs, dropout) if dropout else probs) @ value


def causal_band(queries: int, before: int = 0, *, window: int | None = None, device: torch.device) -> Tensor:
    """[1, 1, queries, before + queries] bool: query i is at slot before + i and sees slot j when 0 <= before + i - j
    (< window)."""
    visible = torch.ones(queries, before + queries, dtype=torch.bool, device=device).tril(before)
    if window is not None:
        visible = visible.triu(before + 1 - window)
    return visible[None, None]


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kv: AttentionPass | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function registered with `transformers`: [B, H, Q, d], [B, H_kv, Q, d] twice -> [B, Q, H, d], None.

    Without `kv`, in an ordinary call of the model, it is SDPA with the model's own mask.

    Raises:
        NotImplementedError: the layer needs more than causal attention. RuntimeError: re-entrant checkpointing.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        out = causal_attention(
            query, key, value, mask=attention_mask, scaling=scaling, dropout=dropout, softcap=softcap
        )
        return out.transpose(1, 2).contiguous(), None
    if not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"{type(module).__name__} is not causal: a rollout needs a decoder that looks only backwards"
        )
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} uses {', '.join(unknown)}, which the rollout does not support"
        )
    if kv.differentiable and not torch.is_grad_enabled():
        raise RuntimeError(
            "activation checkpointing with use_reentrant=True cuts the gradient through the rollout's keys and values; "
            "call gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
    kv.calls += 1
    out = kv.attend(
        cast(int, module.layer_idx),
        query,
        key,
        value,
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
    )
    return out.transpose(1, 2).contiguous(), None


def no_mask(like: Tensor) -> Tensor:
    """A 4-D placeholder. `transformers` passes 4-D masks on unchanged, so the body builds no mask."""
    return torch.empty(1, 1, 1, 1, dtype=torch.bool, device=like.device)


AttentionInterface.register(ATTENTION_NAME, _attention_function)
# An ordinary call gets SDPA's masks. A rollout passes `no_mask`, for which transformers builds none.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
