"""Norms and gates of the decoder as single kernels with a backward pass, for the passes that are captured.

A stock RMSNorm takes seven kernels forward and more backward, most of them in float32, and leaves three tensors of its
input's size for backward. Here it is one kernel each way, which keeps the input alone; so is the gate of an MLP.
`torch.compile` of the layers would fuse them as well, but would compile for each shape, for a minute or more, and again
where an adapter changes.

Only layers are replaced that the engine's decoder body knows as well (`gircse.engine.body.facts`): RMSNorms whose
values were compared on numbers, and gates whose activation was. Frozen weights in half precision or float32 are
required; an RMSNorm that is trained keeps its own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gircse.engine.body.facts import KNOWN, UnknownDecoderError, activation_of, eps_of, offset_of
from gircse.lm.causal_lm import CausalLM
from gircse.ops.backends import kernels, resolve_backend
from gircse.ops.head_facts import text_config

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class FusedLayers:
    """The layers of a model that single kernels can compute.

    Args:
        forwards: for each of them what takes the place of its `forward`.
    """

    def __init__(self, forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> None:
        self.forwards = forwards

    @classmethod
    @torch.no_grad()
    def of(cls, lm: CausalLM) -> FusedLayers:
        """None of them where the decoder is of an unknown kind or the kernels do not run."""
        found: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        if text_config(lm.model).model_type not in KNOWN:
            return cls(found)
        for name, module in lm.body.named_modules():
            if not type(module).__module__.startswith("transformers.models.") or "forward" in vars(module):
                continue
            forward = _norm(module) if name.endswith("norm") else _gate(module)
            if forward is not None:
                found.append((module, forward))
        return cls(found)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the layers run as single kernels. What they did inside can go backward at any time."""
        for module, forward in self.forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in self.forwards:
                del module.forward


def _norm(norm: Any) -> Callable[[Tensor], Tensor] | None:
    weight = getattr(norm, "weight", None)
    if weight is None or weight.requires_grad or resolve_backend(None, weight) != "triton":
        return None
    try:
        return partial(_fused_norm, weight=weight, eps=eps_of(norm), offset=offset_of(norm))
    except UnknownDecoderError:
        return None


def _gate(mlp: Any) -> Callable[[Tensor], Tensor] | None:
    parts = [getattr(mlp, name, None) for name in _GATED]
    if None in parts or {name for name, _ in mlp.named_children()} - set(_GATED):
        return None
    if resolve_backend(None, next(mlp.parameters())) != "triton":
        return None
    try:
        return partial(_fused_mlp, mlp, activation=activation_of(mlp.act_fn))
    except UnknownDecoderError:
        return None


def _fused_norm(x: Tensor, *, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _Norm.apply(x.reshape(-1, x.shape[-1]), weight, eps, offset).view_as(x)


def _fused_mlp(mlp: Any, x: Tensor, *, activation: str) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(_Gate.apply(gate.flatten(0, -2), up.flatten(0, -2), activation).view_as(gate))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = {"eps": eps, "offset": offset}
        return kernels("decoder").add_rms_norm(x, None, weight, **ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return kernels("decoder").norm_grad(x, grads[0].contiguous(), weight, **ctx.options), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return kernels("decoder").gated_pair(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return (*kernels("decoder").gate_grad(gate, up, grads[0].contiguous(), ctx.activation), None)
