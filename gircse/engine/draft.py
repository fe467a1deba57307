"""The draft of a rollout by the block (`gircse.lm.rollout`) on the engine's decoder, with adapters that are not merged.

A drafted token has no gradient, so it needs no stock layers: our body takes nine kernels a layer in place of more than
forty, and the two thin products of each input that adapters read. The prompts' keys and values are copied into a pool
with room for K more of each row, where position and slot are the same. The host waits for nothing, so the draft can be
captured in a graph.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gircse.engine.body.decoder import FusedDecoder
from gircse.engine.body.facts import UnknownDecoderError
from gircse.engine.body.probe import fused_decoder
from gircse.engine.decode import DecodePass, decode_kernel
from gircse.engine.pool import KVPool
from gircse.engine.state import DecodeState
from gircse.lm.attention import RolloutKV
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import FusedLora, fused_lora
from gircse.lm.rollout import RolloutObserver, draft, without_dropout


def fused_drafter(lm: CausalLM) -> FusedDrafter | None:
    """The drafter of a model whose adapters are those of `fuse_lora`; None, with a warning, where our decoder does not
    fit the model. Projections are fused, so nothing else may compute with the model meanwhile."""
    kernel = decode_kernel("auto", lm.device, lm.head_weight.dtype)
    adapters = fused_lora(lm.model)
    try:
        with without_dropout(lm.body), torch.no_grad():
            return FusedDrafter(fused_decoder(lm, kernel, adapters), kernel, adapters)
    except UnknownDecoderError as error:
        warnings.warn(f"soft tokens are drafted by the model's own layers, which is slower: {error}", stacklevel=2)
        return None


class FusedDrafter:
    """A `gircse.lm.rollout.Drafter`. While adapters are merged or switched off, `draft` takes its place."""

    def __init__(self, decoder: FusedDecoder, kernel: str, adapters: FusedLora | None) -> None:
        self._decoder, self._kernel, self._adapters = decoder, kernel, adapters

    @torch.no_grad()
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
        if self._adapters is not None and any(shared.products is None for shared in self._adapters.inputs):
            return draft(lm, kv, prompt, num_steps, temperature=temperature, observer=observer)
        rows, facts = len(prompt), lm.facts()
        slots = next(iter(kv.prompt.values()))[0].shape[2]
        pool = KVPool(rows * (slots + num_steps))
        state = DecodeState.allocate(rows, num_steps, prompt)
        state.hidden.copy_(prompt)
        state.position.copy_(kv.lengths)
        decoding = DecodePass(pool, rows, slots + num_steps, state.position, self._kernel)
        for layer, (key, value) in kv.prompt.items():
            keys, values = decoding.buffers(layer, key.shape[1], (key.shape[3], value.shape[3]), key)
            keys[:, :, :slots], values[:, :, :slots] = key, value
        tokens: list[Tensor] = []
        for t in range(num_steps):
            token, stats = lm.soft_embed(state.hidden, temperature=temperature, return_stats=True, facts=facts)
            if observer is not None:
                observer.soft_token(t, stats.entropy)
            tokens.append(token)
            if t + 1 < num_steps:
                decoding.begin()
                self._decoder.step(decoding, token.clone(), state)  # which overwrites what it is given
        return torch.stack(tokens, dim=1)
