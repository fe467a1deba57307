"""`encode` of a GIRCSE model with `return_steps=True`: embeddings after every number of steps, [n, K, D].

sentence-transformers knows one embedding per text. Where its `encode` would scale or quantise along the wrong axis, the
classes and functions of this file correct it. The file is saved beside `modeling_gircse.py`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor


class StepEmbeddings(Tensor):
    """[B, K, D] embeddings after 1..K steps, within `encode(return_steps=True)` only.

    `encode(normalize_embeddings=True)` scales along dimension 1, which is the steps here; this class scales every
    embedding instead. The result of a later module or of `truncate_dim` keeps the class while it has the same texts and
    steps. `encode` takes out the texts one by one, as plain tensors, and returns only these.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.normalize:
            kwargs["dim"] = -1
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            for steps in (*args, *kwargs.values()):
                if isinstance(steps, cls) and isinstance(result, Tensor):
                    same = result.ndim == steps.ndim and result.shape[:2] == steps.shape[:2]
                    return result.as_subclass(cls) if same else result
            return result


class Output(dict):
    """The result of `forward`. If `encode` asks for another entry, the error names those that exist."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"output_value: got {name!r}, expected 'sentence_embedding', or None for {', '.join(self)}; a GIRCSE model "
            "has no embedding for each token of a text"
        )


@functools.wraps(SentenceTransformer.encode, assigned=["__doc__"])
def encode_steps_apart(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `encode`, except for `return_steps` with a `precision` of fewer bits. Then every step is
    quantised separately, as `encode(num_steps=k, precision=..)` does; the library would take the ranges of the values
    from the wrong axis."""
    encode = type(model).encode
    call = inspect.signature(encode).bind(model, *args, **kwargs)
    call.apply_defaults()
    wanted = call.arguments
    precision, to_tensor, to_numpy = (wanted[name] for name in ("precision", "convert_to_tensor", "convert_to_numpy"))
    stepwise = kwargs.get("return_steps") and wanted["output_value"] == "sentence_embedding"
    if not stepwise or precision in (None, "float32") or len(wanted["inputs"]) == 0:
        return encode(model, *args, **kwargs)
    wanted.update(precision="float32", convert_to_tensor=False, convert_to_numpy=True)
    steps = encode(*call.args, **call.kwargs)  # [n, K, D], or of a single text [K, D]
    texts = steps.reshape(-1, *steps.shape[-2:])
    quantized = np.stack([quantize_embeddings(step, precision=precision) for step in texts.swapaxes(0, 1)], axis=1)
    quantized = quantized.reshape(*steps.shape[:-1], -1)
    if to_tensor:
        return torch.from_numpy(quantized)
    return quantized if to_numpy else list(torch.from_numpy(quantized))
