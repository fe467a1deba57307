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

    Parameters and buffers (names, dtypes, shapes, bytes), the tokenizer, and the config without `num_steps`. An adapter
    that is folded in counts as other weights than the same one apart: they round differently. Reads every weight once,
    at 1 to 2 GB/s.
    """
    digest = hashlib.sha256()
    config = {name: value for name, value in asdict(model.config).items() if name != "num_steps"}
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(_tokenizer_state(model.tokenizer))
    for name, tensor in [*model.base.named_parameters(), *model.base.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain_parts(tensor):
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


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
