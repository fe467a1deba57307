"""A frozen base in 4 or 8 bits to train LoRA on (QLoRA, Dettmers et al., arXiv 2305.14314), by bitsandbytes through
transformers' own quantization config.

Only the decoder's linear layers are quantised: the embedding table and the head, of which soft tokens are made, stay as
they are.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

KINDS = ("nf4", "int8")


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """A `transformers.BitsAndBytesConfig`.

    Args:
        kind: "nf4" (4-bit normal floats, their scales quantised as well) or "int8" (LLM.int8()).
        dtype: of the products with nf4 weights.

    Raises:
        ValueError: another kind. ModuleNotFoundError: bitsandbytes or accelerate is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization: got {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
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
