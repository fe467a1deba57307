"""What our decoder body must know of a stock decoder: its layers' weights, its norms, its rotary values, its attention.

Layers of the Llama family have the same parts under the same names. The parts are read from the modules; what the stock
attention is called with (scaling, window, soft-cap, heads) is recorded from a pass of the stock body itself. Whatever
is not known raises `UnknownDecoderError`, and then the stock body runs. `probe.py` compares the states afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gircse.engine.body.plain import ACTIVATIONS, rms_norm
from gircse.lm.adapter import adapters_at_work
from gircse.lm.attention import PromptPass, RolloutKV
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import FusedLora
from gircse.ops.head_facts import text_config
from gircse.ops.probe import relative_error, tolerance_of

# The decoders that were read line by line. Another one may have the same parts and combine them differently in cases
# that no short probe sees, such as a factor on the queries of far positions.
KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"})
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_GEMMA_NORMS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_QUERY_KEY_NORMS = {"q_norm", "k_norm"}


class UnknownDecoderError(Exception):
    """Why our body cannot take the place of a decoder's own."""


class Attention(NamedTuple):
    """What the stock attention of a layer is called with."""

    layer: int  # its index, under which the pool keeps its keys and values
    heads: int
    kv_heads: int
    size: int
    scaling: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention: see `Attention`.
        before_attention, before_mlp: [D], weights of the norms of the residual stream.
        after_attention, after_mlp: [D], weights of the norms of a block's output (Gemma 2 and 3), or None.
        qkv: the projections of queries, keys and values, or one of all three (Phi-3).
        q_norm, k_norm: [d], weights of the norms of a head, or None.
        out, down: the projections back to the residual stream.
        gate_up: gate and up projection, or one of both (Phi-3).
        activation: a key of `ACTIVATIONS`.
        rotary: the type of layer that the rotary values depend on, or None.
    """

    attention: Attention
    before_attention: Tensor
    before_mlp: Tensor
    after_attention: Tensor | None
    after_mlp: Tensor | None
    qkv: tuple[nn.Linear, ...]
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: nn.Linear
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    activation: str
    rotary: str | None


@dataclass(frozen=True)
class DecoderFacts:
    """A decoder.

    Attributes:
        layers: in their order.
        norm: [D], the weight of the last norm.
        eps, offset: of all norms, see `rms_norm`.
        rotary: the module of the rotary values.
        positions: the most positions of a text; None: no limit is known.
    """

    layers: list[Layer]
    norm: Tensor
    eps: float
    offset: float
    rotary: nn.Module
    positions: int | None

    @classmethod
    @torch.no_grad()
    def of(cls, lm: CausalLM, ids: Tensor, adapters: FusedLora | None = None) -> tuple[DecoderFacts, Tensor]:
        """The facts of `lm`'s decoder, and the stock states [1, N, D] of the token ids [1, N] that it was read with.

        Args:
            adapters: that our body computes beside the layers below them; any other one must be merged.

        Raises:
            UnknownDecoderError: the decoder, or a layer of it, is of another kind.
        """
        body: Any = lm.body
        kind = text_config(lm.model).model_type
        if kind not in KNOWN:
            raise UnknownDecoderError(f"model_type {kind!r} is not among {', '.join(sorted(KNOWN))}")
        family = kind.removesuffix("_text")
        if type(body).__module__ != f"transformers.models.{family}.modeling_{family}":
            raise UnknownDecoderError(f"{type(body).__name__} is not the class of transformers")
        _check_parts("the decoder", body, _BODY)
        adapted = {layer for shared in adapters.inputs for layer in shared.layers} if adapters is not None else set()
        _check_hooks(body, adapted)
        recorder = _Recorder(RolloutKV(torch.full((1,), ids.shape[1], device=ids.device)))
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        states = lm.run_body(recorder, positions, input_ids=ids)
        if len(recorder.layers) != len(body.layers):
            raise UnknownDecoderError(f"{len(recorder.layers)} of {len(body.layers)} layers attend")
        norms = [module for name, module in body.named_modules() if name.endswith("norm")]
        kinds = {(type(norm).__name__, eps_of(norm)) for norm in norms}
        if len(kinds) != 1:
            raise UnknownDecoderError(f"its norms differ: {', '.join(f'{n}, epsilon {e}' for n, e in sorted(kinds))}")
        eps, offset = eps_of(body.norm), offset_of(body.norm)
        dtype, device = body.norm.weight.dtype, body.norm.weight.device
        layers = [_layer(layer, call, adapted) for layer, call in zip(body.layers, recorder.layers, strict=True)]
        for parameter in _weights(layers, norms):
            if type(parameter) is not nn.Parameter or not parameter.is_contiguous():
                raise UnknownDecoderError(f"a weight is a {type(parameter).__name__}, expected a plain parameter")
            if parameter.untyped_storage().nbytes() != parameter.nbytes:
                # Such as the flat parameters of DeepSpeed, which would go on updating the place that `fuse` leaves.
                raise UnknownDecoderError("a weight is part of a larger tensor, from which it must not be moved")
            if (parameter.dtype, parameter.device) != (dtype, device) or parameter.is_meta:
                raise UnknownDecoderError(
                    f"a weight is in {parameter.dtype} on {parameter.device}, another in {dtype} on {device}"
                )
        return cls(layers, body.norm.weight, eps, offset, body.rotary_emb, lm.max_positions), states


class _Recorder(PromptPass):
    """The prompt pass, which notes what the layers call it with."""

    def __init__(self, kv: RolloutKV) -> None:
        super().__init__(kv)
        self.layers: list[Attention] = []

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
        if value.shape != key.shape or key.shape[3] != size:
            raise UnknownDecoderError("its values are of another size than its keys")
        self.layers.append(Attention(layer, heads, kv_heads, size, scaling, window, softcap))
        return super().attend(
            layer, query, key, value, scaling=scaling, dropout=dropout, window=window, softcap=softcap
        )


def _layer(layer: Any, call: Attention, adapted: Set[nn.Module]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    gemma = hasattr(layer, "pre_feedforward_layernorm")
    _check_parts("a layer", layer, {"self_attn", "mlp"} | _NORMS | (_GEMMA_NORMS if gemma else set()))
    norms = _QUERY_KEY_NORMS if hasattr(attention, "q_norm") else set()
    together = hasattr(attention, "qkv_proj")
    projections = {"qkv_proj"} if together else {"q_proj", "k_proj", "v_proj"}
    _check_parts("its attention", attention, {"o_proj"} | projections | norms)
    act_name = "activation_fn" if together else "act_fn"
    _check_parts(
        "its MLP", mlp, {"down_proj", *(("gate_up_proj",) if together else ("gate_proj", "up_proj"))}, act_name
    )
    qkv = (attention.qkv_proj,) if together else (attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up = (mlp.gate_up_proj,) if together else (mlp.gate_proj, mlp.up_proj)
    return Layer(
        attention=call,
        before_attention=layer.input_layernorm.weight,
        before_mlp=(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm).weight,
        after_attention=layer.post_attention_layernorm.weight if gemma else None,
        after_mlp=layer.post_feedforward_layernorm.weight if gemma else None,
        qkv=_linears(adapted, *qkv),
        q_norm=attention.q_norm.weight if norms else None,
        k_norm=attention.k_norm.weight if norms else None,
        out=_linears(adapted, attention.o_proj)[0],
        gate_up=_linears(adapted, *gate_up),
        down=_linears(adapted, mlp.down_proj)[0],
        activation=activation_of(getattr(mlp, act_name)),
        rotary=getattr(attention, "layer_type", None),
    )


def _check_parts(what: str, module: nn.Module, expected: set[str], *optional: str) -> None:
    """Dropout does nothing in eval mode, so any number of it is allowed."""
    parts = {name for name, part in module.named_children() if not isinstance(part, (nn.Dropout, nn.Identity))}
    if parts - set(optional) != expected:
        raise UnknownDecoderError(f"{what} ({type(module).__name__}) has the parts {', '.join(sorted(parts))}")


def _check_hooks(body: Any, adapted: Set[nn.Module]) -> None:
    """A layer that someone has hooked into or replaced computes something that is not in its weights."""
    inside = set(body.embed_tokens.modules())  # which the body calls as it is
    for name, module in body.named_modules():
        if module in inside:
            continue
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers leaves hooks that do nothing unless a call asks for all hidden states
        if any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks):
            raise UnknownDecoderError(f"{name or 'the decoder'} has a forward hook")
        if "forward" in vars(module) and module not in adapted:
            raise UnknownDecoderError(f"the forward method of {name or 'the decoder'} was replaced")


def _linears(adapted: Set[nn.Module], *layers: Any) -> tuple[nn.Linear, ...]:
    """The layers below adapters that are merged, switched off or among the layers `adapted`."""
    found = []
    for layer in layers:
        if hasattr(layer, "merged_adapters"):
            disabled, active, merged, _ = adapters_at_work(layer)
            if layer not in adapted and bool(merged) == disabled and (merged or active):
                raise UnknownDecoderError("an adapter is active and not merged (merge_adapter() merges it)")
            layer = layer.get_base_layer()
        if type(layer) is not nn.Linear:
            raise UnknownDecoderError(f"a projection is a {type(layer).__name__}, expected nn.Linear")
        found.append(layer)
    if len({layer.bias is None for layer in found}) != 1:
        raise UnknownDecoderError("some of the projections of one input have a bias and others have none")
    return tuple(found)


def _weights(layers: list[Layer], norms: list[Any]) -> Iterator[nn.Parameter]:
    for norm in norms:
        yield norm.weight
    for layer in layers:
        for linear in (*layer.qkv, layer.out, *layer.gate_up, layer.down):
            yield from linear.parameters()


def eps_of(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or set(dict(norm.named_parameters())) != {"weight"}:
        raise UnknownDecoderError(f"{type(norm).__name__} is not an RMSNorm with one weight and an epsilon")
    return eps


def offset_of(norm: Any) -> float:
    """Whether a norm scales by its weight or by 1 + weight."""
    weight = norm.weight
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    errors = {offset: relative_error(rms_norm(x, weight, eps_of(norm), offset), norm(x)) for offset in (0.0, 1.0)}
    offset = min(errors, key=lambda offset: errors[offset])
    if not errors[offset] <= tolerance_of(weight.dtype):
        raise UnknownDecoderError(f"{type(norm).__name__} scales neither by its weight nor by 1 + weight")
    return offset


def activation_of(function: Any) -> str:
    x = torch.linspace(-4, 4, 64, dtype=torch.float32)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(function(x), known(x), rtol=1e-6, atol=1e-6):
            return name
    raise UnknownDecoderError(f"its activation {type(function).__name__} is not among {', '.join(ACTIVATIONS)}")


def takes_type(rotary: nn.Module) -> bool:
    """Whether the rotary values depend on the type of layer (Gemma 3)."""
    return "layer_type" in inspect.signature(rotary.forward).parameters
