"""A name for the weights themselves, so that no cache gives the scores of yesterday's model."""

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
    """16 hexadecimal digits of everything that decides an embedding but the arguments of `encode`.

    Parameters and buffers (names, dtypes, shapes, bytes), which adapters are active and how strong, the tokenizer, the
    base's config, and ours without `num_steps` and the token limits. An adapter that is folded in counts as other
    weights than the same one apart: they round differently. Reads every weight once, at 1 to 2 GB/s.
    """
    digest = hashlib.sha256()
    arguments = {"num_steps", "query_max_length", "passage_max_length"}
    config = {name: value for name, value in asdict(model.config).items() if name not in arguments}
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(_tokenizer_state(model.tokenizer))
    digest.update(json.dumps(_base_config(model), sort_keys=True, default=str).encode())
    for name, layer in model.base.named_modules():
        if hasattr(layer, "active_adapters") and hasattr(layer, "merged_adapters"):  # one of peft's
            state = [layer.active_adapters, layer.disable_adapters, layer.merged_adapters, getattr(layer, "scaling", 0)]
            digest.update(json.dumps([name, state], sort_keys=True, default=str).encode())
    for name, tensor in [*model.base.named_parameters(), *model.base.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain_parts(tensor):
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _base_config(model: GIRCSE) -> dict[str, Any]:
    """Of the transformers config what a checkpoint could change without changing a weight (a soft-cap, a window, ..),
    without what says where, by which version and for what use it was loaded."""
    volatile = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    config = model._unwrapped().config.to_dict()
    return {name: value for name, value in config.items() if name not in volatile and not name.startswith("_")}


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a quantised weight is made of; of an ordinary one, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _tokenizer_state(tokenizer: Any) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    state = json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # what the last call happened to leave there
        state.pop(name, None)
    return json.dumps(state, sort_keys=True).encode()
