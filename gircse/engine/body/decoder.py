"""The decoder that the engine runs: the stock body, or ours of nine kernels a layer.

A layer of ours is add + RMSNorm, one product for queries, keys and values, rotary embedding and the write of keys and
values, attention, output product, add + RMSNorm, one product for gate and up, activation times up, down product. The
same code serves decoding and packed prefill; the pass (`DecodePass`, `PrefillPass`) says where a token's keys and
values are and computes the attention. The elementwise steps are those of `plain.py` or of `gircse_kernels.decoder`.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from gircse.engine.body import plain
from gircse.engine.body.facts import DecoderFacts
from gircse.engine.body.rotary import RotaryTables
from gircse.engine.body.weights import Projection
from gircse.engine.decode import DecodePass
from gircse.engine.pool import PoolPass
from gircse.engine.prefill import PrefillPass
from gircse.engine.state import DecodeState
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import FusedLora
from gircse.lm.onednn import onednn_linears
from gircse.ops.backends import kernels, resolve_backend


class Decoder(Protocol):
    """A decoder body on the engine's buffers."""

    def prefill(self, kv: PrefillPass) -> Tensor:
        """The last state of each text, [n, D]."""

    def step(self, kv: DecodePass, token: Tensor, state: DecodeState) -> None:
        """Runs the tokens [R, D] at `state.position`, and moves `state` on by one step."""

    def block(self, kv: PoolPass, tokens: Tensor) -> Tensor:
        """The states [T, D] of several tokens [T, D] of each row, which may be overwritten."""


class StockDecoder:
    """The model's own body.

    Args:
        compile: run it through `torch.compile` in decoding.
    """

    def __init__(self, lm: CausalLM, *, compile: bool = False) -> None:
        self._eager = self._step = lm
        if compile:  # Shapes are static, so a step is compiled once per bucket. Graphs are captured by `StepRunner`.
            self._step = replace(lm, body=cast(nn.Module, torch.compile(lm.body, dynamic=False)))

    def prefill(self, kv: PrefillPass) -> Tensor:
        return self._eager.run_body(kv, kv.positions[None], input_ids=kv.ids[None])[0, kv.last]

    def step(self, kv: DecodePass, token: Tensor, state: DecodeState) -> None:
        hidden = self._step.run_body(kv, state.position[:, None], inputs_embeds=token[:, None])[:, 0]
        state.hidden.copy_(hidden)
        state.states[kv.row, state.step] = hidden
        state.position.add_(1)
        state.step.add_(1)

    def block(self, kv: PoolPass, tokens: Tensor) -> Tensor:
        return self._eager.run_body(kv, kv.positions[None], inputs_embeds=tokens[None])[0]


class FusedDecoder:
    """Our body.

    Args:
        lm: the model.
        facts: of its decoder.
        adapters: that work without being merged.
    """

    def __init__(self, lm: CausalLM, facts: DecoderFacts, adapters: FusedLora | None = None) -> None:
        self._lm, self._facts = lm, facts
        self._ops, self._norm = _ops(facts.norm), {"eps": facts.eps, "offset": facts.offset}
        self._layers = [
            (
                layer,
                Projection(layer.qkv, adapters),
                Projection((layer.out,), adapters),
                Projection(layer.gate_up, adapters),
                Projection((layer.down,), adapters),
            )
            for layer in facts.layers
        ]
        self._rotary = RotaryTables(facts.rotary, facts.norm, facts.positions)
        layer = facts.layers[0]
        products = *layer.qkv, layer.out, *layer.gate_up, layer.down
        self.layer_parameters = sum(module.weight.numel() for module in products)

    def prefill(self, kv: PrefillPass) -> Tensor:
        return self._finish(*self._run(kv, self._lm.model.get_input_embeddings()(kv.ids), kv.last))

    def block(self, kv: PoolPass, tokens: Tensor) -> Tensor:
        return self._finish(*self._run(kv, tokens))

    def _finish(self, x: Tensor, delta: Tensor) -> Tensor:
        """The last addition and norm."""
        after = self._facts.layers[-1].after_mlp
        return self._ops.add_rms_norm(x, delta, self._facts.norm, delta_weight=after, **self._norm)

    def step(self, kv: DecodePass, token: Tensor, state: DecodeState) -> None:
        x, delta = self._run(kv, token)
        self._ops.finish_step(
            x,
            delta,
            self._facts.norm,
            state.states,
            state.position,
            state.step,
            delta_weight=self._facts.layers[-1].after_mlp,
            out=state.hidden,
            **self._norm,
        )

    def _run(self, kv: PoolPass, x: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream before its last addition, and what the last layer adds to it.

        Args:
            x: [T, D], the embeddings; overwritten.
            last: [n] int64, the tokens whose states are wanted; None: all.
        """
        ops, delta, after, norm = self._ops, None, None, self._norm
        with onednn_linears(self._lm.body, x[None]):
            for layer, project_qkv, project_out, project_gate_up, project_down in self._layers:
                index, heads, kv_heads, size, scaling, window, softcap = layer.attention
                normed = ops.add_rms_norm(x, delta, layer.before_attention, delta_weight=after, **norm)
                qkv = project_qkv(normed)
                keys, values = kv.buffers(index, kv_heads, (size, size), qkv)
                cos, sin = self._rotary.of(layer.rotary, kv.slots)
                ops.rotary_write(
                    qkv, cos, sin, kv.positions, kv.row, keys, values, q_norm=layer.q_norm, k_norm=layer.k_norm, **norm
                )
                query, key, value = qkv.view(len(qkv), -1, size).split((heads, kv_heads, kv_heads), dim=1)
                out = kv.attention(index, query, key, value, scaling=scaling, window=window, softcap=softcap)
                if last is not None and layer is self._facts.layers[-1]:
                    x, out = x[last], out[last]
                delta = project_out(out.flatten(1))
                normed = ops.add_rms_norm(x, delta, layer.before_mlp, delta_weight=layer.after_attention, **norm)
                delta = project_down(ops.gated(project_gate_up(normed), layer.activation))
                after = layer.after_mlp
        assert delta is not None
        return x, delta


def _ops(weight: Tensor) -> ModuleType:
    """The elementwise steps for weights like this one."""
    return kernels("decoder") if resolve_backend(None, weight) == "triton" else plain
