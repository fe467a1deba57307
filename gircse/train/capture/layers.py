"""Norms, rotary embeddings and gates as single kernels with a backward pass, for the passes that are captured.

A stock RMSNorm takes seven kernels forward and more backward, most of them in float32, and leaves three tensors of its
input's size for backward. Here it is one kernel each way, which keeps the input alone; so are the gate of an MLP and
the rotary embedding of queries or keys.
`torch.compile` of the layers would fuse them as well, but would compile for each shape, for a minute or more, and again
where an adapter changes.

Only what the engine's decoder body knows as well is replaced (`gircse.engine.body.facts`): RMSNorms whose values were
compared on numbers, gates whose activation was, and the rotary function of these decoders, which is a global of their
module. Frozen weights in half precision or float32 are required; an RMSNorm that is trained keeps its own kernels.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gircse.engine.body.facts import KNOWN, UnknownDecoderError, activation_of, eps_of, offset_of
from gircse.lm.causal_lm import CausalLM
from gircse.ops.backends import kernels, resolve_backend
from gircse.ops.head_facts import text_config

_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class FusedLayers:
    """The layers of a model that single kernels can compute.

    Args:
        forwards: for each of them what takes the place of its `forward`.
        rotary: the Python module whose rotary function is replaced.
    """

    def __init__(
        self, forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]], rotary: ModuleType | None = None
    ) -> None:
        self.forwards = forwards
        self.rotary = rotary

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
        rotary = sys.modules[type(lm.body).__module__]
        usable = resolve_backend(None, lm.embed_weight) == "triton" and hasattr(rotary, _ROTARY)
        return cls(found, rotary if usable else None)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the layers run as single kernels. What they did inside can go backward at any time."""
        for module, forward in self.forwards:
            module.forward = forward
        stock = getattr(self.rotary, _ROTARY, None)
        if self.rotary is not None:
            setattr(self.rotary, _ROTARY, partial(_rotated, stock, threading.get_ident()))
        try:
            yield
        finally:
            if self.rotary is not None:
                setattr(self.rotary, _ROTARY, stock)
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


def _rotated(
    stock: Any, thread: int, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The stock function in other threads, and for heads that are rotated in part or are not [B, H, N, d]."""
    fits = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and cos.stride() == sin.stride()
    if threading.get_ident() != thread or args or kwargs or not fits:
        return stock(q, k, cos, sin, *args, **kwargs)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels("decoder").rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return kernels("decoder").rotate(grad, *ctx.saved_tensors, backward=True), None, None


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
