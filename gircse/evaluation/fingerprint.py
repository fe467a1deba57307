"""A name for the weights of a model, so that no cache returns the scores of other weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gircse.model import GIRCSE


def fingerprint(model: GIRCSE) -> str:
    """16 hexadecimal digits of everything that decides an embedding, except the arguments of `encode`.

    That is parameters and buffers (names, dtypes, shapes, bytes), which adapters are active and how strong, the
    tokenizer, the base's config, and ours without `num_steps` and the token limits, and without decoding and its
    tolerance where that is sequential. A model with a merged adapter has
    another fingerprint than with the same adapter apart, because the two round differently. Every weight is read once,
    at 1 to 2 GB/s.
    """
    digest = hashlib.sha256()
    arguments = {"num_steps", "query_max_length", "passage_max_length"}
    if model.config.decoding == "sequential":
        arguments |= {"decoding", "jacobi_tolerance"}
    config = {name: value for name, value in asdict(model.config).items() if name not in arguments}
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(_tokenizer_state(model.tokenizer))
    digest.update(json.dumps(_base_config(model), sort_keys=True, default=str).encode())
    for name, layer in model.base.named_modules():
        if hasattr(layer, "active_adapters") and hasattr(layer, "merged_adapters"):  # a layer of peft
            state = [layer.active_adapters, layer.disable_adapters, layer.merged_adapters, getattr(layer, "scaling", 0)]
            digest.update(json.dumps([name, state], sort_keys=True, default=str).encode())
    for name, tensor in [*model.base.named_parameters(), *model.base.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain_parts(tensor):
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _base_config(model: GIRCSE) -> dict[str, Any]:
    """The entries of the transformers config that change an embedding (a soft-cap, a window, ..). Left out is what
    depends on how the model was loaded: path, version, dtype, cache."""
    volatile = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    config = model._unwrapped().config.to_dict()
    return {name: value for name, value in config.items() if name not in volatile and not name.startswith("_")}


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a quantised weight consists of, or the tensor itself if it is an ordinary one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _tokenizer_state(tokenizer: Any) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    state = json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # settings of the last call
        state.pop(name, None)
    return json.dumps(state, sort_keys=True).encode()
