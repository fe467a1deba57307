"""Tries against "later steps add nothing": other soft tokens, or other keys for the steps. One function each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.lm.attention import RolloutKV, StepPass
from gircse.lm.causal_lm import CausalLM
from gircse.lm.rollout import draft


@torch.no_grad()
def new_part(
    lm: CausalLM, kv: RolloutKV, prompt: Tensor, num_steps: int, *, temperature: Any = 1.0, observer: Any = None
) -> Tensor:
    """Soft tokens of the part of each state that the state before does not hold, at the length of the whole state."""
    facts, hidden, before, tokens = lm.facts(), prompt, None, []
    for t in range(num_steps):
        fed = hidden
        if before is not None:
            along = (hidden * before).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True)
            fed = hidden - along * before
            fed = fed * (hidden.norm(dim=-1, keepdim=True) / fed.norm(dim=-1, keepdim=True))
        tokens.append(lm.soft_embed(fed, temperature=temperature, facts=facts))
        if t + 1 < num_steps:
            before, hidden = hidden, lm.run_step(kv, t, tokens[-1])
    return torch.stack(tokens, dim=1)


class _Hiding(RolloutKV):
    """A rollout whose steps do not see the prompt's slots where `hidden` [B, N] is True."""

    def __init__(self, kv: RolloutKV, hidden: Tensor) -> None:
        super().__init__(kv.lengths)
        self.prompt, self.hidden = kv.prompt, hidden

    def step_pass(self, step: int) -> StepPass:
        return _HidingPass(self, step)


class _HidingPass(StepPass):
    kv: _Hiding

    def _mask(self, queries: int, slots: int, window: int | None) -> Tensor:
        mask = super()._mask(queries, slots, window)
        hidden = F.pad(self.kv.hidden, (0, mask.shape[-1] - slots))
        return mask | hidden[:, None, None, None]


def dropped_keys(lm: CausalLM, ids: Tensor, lengths: Tensor, num_steps: int, temperature: float) -> Tensor:
    """The rollout by the block in which each slot of the prompt but the last is hidden from all steps with probability
    0.5; in training only. -> h_0, g_1..g_K [B, K + 1, D]."""
    kv = RolloutKV(lengths)
    states = lm.run_prompt(kv, ids)
    rows = torch.arange(len(lengths), device=lengths.device)
    prompt = states[rows, lengths - 1]
    slots = torch.arange(ids.shape[1], device=ids.device)
    drop = (torch.rand(ids.shape, device=ids.device) < 0.5) & (slots < lengths[:, None] - 1)
    with torch.no_grad():
        tokens = draft(lm, _Hiding(kv.detached(), drop), prompt.detach(), num_steps, temperature=temperature)
    return torch.cat([prompt[:, None], lm.run_block(_Hiding(kv, drop), tokens)], dim=1)


DRAFTERS = {"new-part": new_part}
DROPPING = {"dropped-keys": dropped_keys}
