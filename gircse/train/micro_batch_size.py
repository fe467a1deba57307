"""How many tokens may go through the model at once in training: a short probe at the start of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from gircse.engine.free_memory import free_bytes
from gircse.model import GIRCSE

_ROWS, _LENGTH = 2, 32  # of the probe's texts
_LEAST = 256
# Beyond this, larger micro-batches are no faster on a CPU.
_MOST_ON_CPU = 8192
_FIRST_ON_CUDA = 2048
_SHARE = 0.8  # of the memory: the rest is for the optimizer's state, the loss, fragments


def probe_budget(model: GIRCSE, *, num_steps: int, length: int, sharded: bool = False) -> int:
    """Positions of a micro-batch (padding and K steps included) that the memory holds.

    On CUDA by trying: micro-batches of growing size go forward and backward until the memory's end is in sight.
    Elsewhere, and where every process must make the same passes (`sharded`), from the size of what autograd keeps for
    a small micro-batch. The parameters' gradients are cleared; random numbers are drawn.

    Args:
        length: of the longest texts to come, tokens.
    """
    if model.device.type == "cuda" and not sharded:
        found = _by_trying(model, num_steps, min(length, 512))
    else:
        room = free_bytes(model.device)
        found = int(_SHARE * room / activation_bytes(model, num_steps))
    if model.device.type == "cpu":
        found = min(found, _MOST_ON_CPU)
    return max(found, _LEAST)


def activation_bytes(model: GIRCSE, num_steps: int) -> float:
    """What training keeps for backward, per position: measured, parameters left out.

    With activation checkpointing one layer at a time is held in full as well.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = _kept_bytes(model, num_steps, own)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        training = model.training
        model.eval()  # layers are checkpointed in training only
        kept += _kept_bytes(model, num_steps, own) / model.causal_lm.config.num_hidden_layers
        model.train(training)
    return kept


def _kept_bytes(model: GIRCSE, num_steps: int, own: set[int]) -> float:
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.rollout(*_texts(model, _ROWS, _LENGTH), num_steps)
    del states
    return max(sum(found.values()), 1) / (_ROWS * (_LENGTH + num_steps))


def _by_trying(model: GIRCSE, num_steps: int, length: int) -> int:
    """Doubles the micro-batch until the rest can be told by proportion, or until it no longer fits."""
    device = model.device
    before = torch.cuda.memory_allocated(device)
    room = _SHARE * (before + free_bytes(device)) - before
    tokens = _FIRST_ON_CUDA
    while True:
        rows = max(1, tokens // (length + num_steps))
        torch.cuda.reset_peak_memory_stats(device)
        try:
            model.rollout(*_texts(model, rows, length), num_steps).sum().backward()
        except torch.OutOfMemoryError:
            return tokens // 2
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        made = rows * (length + num_steps)
        found = int(made * room / max(torch.cuda.max_memory_allocated(device) - before, 1))
        if found < 4 * made:
            return found
        tokens *= 2


def _texts(model: GIRCSE, rows: int, length: int) -> tuple[Tensor, Tensor]:
    vocab = model.causal_lm.vocabulary
    ids = torch.arange(rows * length).reshape(rows, length) % vocab
    return ids, torch.ones_like(ids)
