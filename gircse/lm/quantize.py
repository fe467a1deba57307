"""Fewer bits for the decoder's matrices: of a model for encoding (torchao) and of a frozen base (bitsandbytes).

Only the decoder's linear layers are quantised. The embedding table and the head, of which soft tokens are made, keep
their dtype.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from gircse.lm.causal_lm import CausalLM

WEIGHT_ONLY = ("int8", "fp8")
FROZEN_BASE = ("nf4", "int8")


def quantize_weights(causal_lm: CausalLM, kind: str, *, adapted: bool) -> None:
    """See `GIRCSE.quantize_weights`; `adapted`: the model has an adapter that is apart from its base."""
    if kind not in WEIGHT_ONLY:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, WEIGHT_ONLY))}")
    if adapted:
        raise ValueError(
            "kind: the model has a LoRA adapter apart from its base; fold it in for good first: "
            "GIRCSE(model.base.merge_and_unload(), model.tokenizer, model.config)"
        )
    if find_spec("torchao") is None:
        raise ModuleNotFoundError("quantize_weights needs torchao: pip install torchao")
    quantization: Any = importlib.import_module("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Float8WeightOnlyConfig()
    layers = {module for module in causal_lm.body.modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        quantization.quantize_(causal_lm.model, config, filter_fn=lambda module, _: module in layers)


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """A `transformers.BitsAndBytesConfig` for a frozen base that LoRA is trained on (QLoRA, Dettmers et al., arXiv
    2305.14314).

    Args:
        kind: "nf4" (4-bit normal floats, their scales quantised as well) or "int8" (LLM.int8()).
        dtype: of the products with nf4 weights.

    Raises:
        ValueError: another kind. ModuleNotFoundError: bitsandbytes or accelerate is not installed.
    """
    if kind not in FROZEN_BASE:
        raise ValueError(f"quantization: got {kind!r}, expected one of {', '.join(map(repr, FROZEN_BASE))}")
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"quantization: got {kind!r}, which needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
