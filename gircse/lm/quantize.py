"""8-bit decoder weights for inference, by torchao."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from gircse.lm.causal_lm import CausalLM

KINDS = ("int8", "fp8")


def quantize_weights(causal_lm: CausalLM, kind: str, *, adapted: bool) -> None:
    """See `GIRCSE.quantize_weights`; `adapted`: the model has an adapter that is not folded in for good."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if adapted:
        raise ValueError(
            "kind: the model has a LoRA adapter apart from its base; fold it in for good first: "
            "GIRCSE(model.base.merge_and_unload(), model.tokenizer, model.config)"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError("quantize_weights needs torchao: pip install torchao")
    quantization: Any = importlib.import_module("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Float8WeightOnlyConfig()
    layers = {module for module in causal_lm.body.modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        quantization.quantize_(causal_lm.model, config, filter_fn=lambda module, _: module in layers)
