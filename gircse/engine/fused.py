"""RMSNorm, rotary embedding and gated MLP as one kernel each, from Liger-Kernel where it is installed.

A Hugging Face block runs dozens of tiny kernels around its matrix products; at one token a row they cost more than
their bytes. Liger's replacements are swapped in only while the engine runs, layer by layer, and only after the decoder
gave the same states with them: a layer that is not known, or computes something else, stays as it is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gircse.lm.attention import RolloutKV
from gircse.lm.causal_lm import PROBE_TOLERANCE, CausalLM

_PROBE_TOKENS = 5


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


class FusedKernels:
    """The replacements for the layers of one decoder.

    Args:
        replacements: (layer, its `forward` while the engine runs).
    """

    def __init__(self, replacements: list[tuple[nn.Module, Callable]]) -> None:
        self._replacements = replacements

    def __len__(self) -> int:
        return len(self._replacements)

    @classmethod
    def of(cls, lm: CausalLM) -> FusedKernels | None:
        """What Liger-Kernel has for this decoder; None where it has nothing, or something else comes out with it."""
        norms, gated = _liger("ops.rms_norm"), (_liger("ops.swiglu"), _liger("ops.geglu"))
        found: list[tuple[nn.Module, Callable]] = []
        namespaces = set()
        for module in lm.body.modules():
            forward = _norm(module, norms) or _mlp(module, *gated)
            if forward is not None:
                found.append((module, forward))
            if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
                namespaces.add(type(module).__module__)
        fused = cls(found)
        for name in namespaces:
            _dispatch_rotary(sys.modules[name])
        if not found:
            return None
        error = fused._error(lm)
        if not error <= PROBE_TOLERANCE.get(lm.head_weight.dtype, 6e-2):
            warnings.warn(
                f"Liger-Kernel's layers change the states of {type(lm.model).__name__} by {error:.1e}; "
                "the engine runs on the model's own",
                stacklevel=3,
            )
            return None
        return fused

    @contextmanager
    def active(self) -> Iterator[None]:
        """The layers run fused inside. Calls of the decoder from other threads meanwhile do as well."""
        for module, forward in self._replacements:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._replacements:
                del module.__dict__["forward"]

    @torch.inference_mode()
    def _error(self, lm: CausalLM) -> float:
        """Relative difference of the decoder's states with and without."""
        ids = torch.linspace(0, lm.embed_weight.shape[0] - 1, _PROBE_TOKENS, device=lm.device).long()[None]
        lengths = torch.full((1,), _PROBE_TOKENS, device=lm.device)
        with torch.enable_grad(), torch.inference_mode(False):  # the rotary embedding's own code
            expected = lm.run_prompt(RolloutKV(lengths), ids.clone()).detach()
        with self.active():
            got = lm.run_prompt(RolloutKV(lengths), ids)
        return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def _liger(module: str) -> Any:
    return importlib.import_module(f"liger_kernel.{module}")


def _norm(module: nn.Module, liger: Any) -> Callable | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    name = type(module).__name__
    if not name.endswith("RMSNorm") or not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    # Gemma scales by 1 + weight, and in float32
    offset, casting = (1.0, "gemma") if name.startswith("Gemma") else (0.0, "llama")

    def forward(hidden: Tensor) -> Tensor:
        return liger.LigerRMSNormFunction.apply(hidden, module.weight, eps, offset, casting, False)

    return forward


def _mlp(module: nn.Module, swiglu: Any, geglu: Any) -> Callable | None:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    activation = type(module.act_fn).__name__
    if activation in ("SiLU", "SiLUActivation"):
        multiply = swiglu.LigerSiLUMulFunction.apply
    elif activation in ("GELUTanh", "PytorchGELUTanh"):
        multiply = geglu.LigerGELUMulFunction.apply
    else:
        return None
    layers: Any = module

    def forward(hidden: Tensor) -> Tensor:
        return layers.down_proj(multiply(layers.gate_proj(hidden), layers.up_proj(hidden)))

    return forward


def _dispatch_rotary(namespace: Any) -> None:
    """Models look their rotary function up in their own module: there it becomes one that takes Liger's on a GPU
    outside of training. Once for each module, for good."""
    own = getattr(namespace, "apply_rotary_pos_emb", None)
    if own is None or hasattr(own, "gircse_own"):
        return
    rotate = _liger("transformers.rope").liger_rotary_pos_emb

    @functools.wraps(own)
    def dispatch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        usable = q.is_cuda and not torch.is_grad_enabled() and not args and not kwargs and cos.shape[-1] == q.shape[-1]
        return rotate(q, k, cos, sin) if usable else own(q, k, cos, sin, *args, **kwargs)

    dispatch.gircse_own = own  # type: ignore[attr-defined]
    namespace.apply_rotary_pos_emb = dispatch
