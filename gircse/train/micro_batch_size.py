"""The number of tokens that may go through the model at once in training: a short probe at the start of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from gircse.engine.free_memory import free_bytes
from gircse.model import GIRCSE

_ROWS, _LENGTH = 2, 32  # of the texts of a small micro-batch
_LEAST = 256
_MOST_ON_CPU = 8192  # larger micro-batches are no faster on a CPU
_FIRST_ON_CUDA = 2048
_SHARE = 0.8  # of the memory; the rest is for the optimizer's state, the loss and fragmentation


def probe_budget(
    model: GIRCSE,
    *,
    num_steps: int,
    length: int,
    soft_token_gradient: float = 1.0,
    sharded: bool = False,
    graphs: bool = False,
) -> int:
    """The positions of a micro-batch (padding and K steps included) that fit the memory.

    On CUDA, micro-batches of growing size go forward and backward. On a CPU, and where every process must make the same
    passes (`sharded`), the bytes that autograd keeps for a small micro-batch are measured and divided into the free
    memory. The gradients are cleared, and random numbers are drawn.

    Args:
        length: tokens of the longest texts of the run.
        soft_token_gradient: the largest factor of the run: steps by the block, at 0, keep less than others.
        graphs: micro-batches become CUDA graphs (`gircse.train.capture`), which hold their activations beside those of
            a pass of single kernels, so each has half of the memory.
    """
    if model.device.type == "cuda" and not sharded:
        tokens = _by_trying(model, num_steps, soft_token_gradient, min(length, 512)) // (1 + graphs)
    else:
        tokens = int(_SHARE * free_bytes(model.device) / activation_bytes(model, num_steps, soft_token_gradient))
    if model.device.type == "cpu":
        tokens = min(tokens, _MOST_ON_CPU)
    return max(tokens, _LEAST)


def activation_bytes(model: GIRCSE, num_steps: int, soft_token_gradient: float = 1.0) -> float:
    """The measured bytes that autograd keeps for backward for each position, without the parameters.

    With activation checkpointing backward also holds one layer at a time in full.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = _kept_bytes(model, num_steps, soft_token_gradient, own)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        training = model.training
        model.eval()  # layers are checkpointed in training only
        kept += _kept_bytes(model, num_steps, soft_token_gradient, own) / model.causal_lm.config.num_hidden_layers
        model.train(training)
    return kept


def _kept_bytes(model: GIRCSE, num_steps: int, soft_token_gradient: float, own: set[int]) -> float:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.rollout(*_texts(model, _ROWS, _LENGTH), num_steps, soft_token_gradient=soft_token_gradient)
    del states
    return max(sum(kept.values()), 1) / (_ROWS * (_LENGTH + num_steps))


def _by_trying(model: GIRCSE, num_steps: int, soft_token_gradient: float, length: int) -> int:
    """Doubles the size until memory can be extrapolated linearly, or until it runs out."""
    device = model.device
    before = torch.cuda.memory_allocated(device)
    room = _SHARE * (before + free_bytes(device)) - before
    tokens = _FIRST_ON_CUDA
    while True:
        rows = max(1, tokens // (length + num_steps))
        torch.cuda.reset_peak_memory_stats(device)
        try:
            texts = _texts(model, rows, length)
            model.rollout(*texts, num_steps, soft_token_gradient=soft_token_gradient).sum().backward()
        except torch.OutOfMemoryError:
            return tokens // 2
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        made = rows * (length + num_steps)
        fitting = int(made * room / max(torch.cuda.max_memory_allocated(device) - before, 1))
        if fitting < 4 * made:
            return fitting
        tokens *= 2


def _texts(model: GIRCSE, rows: int, length: int) -> tuple[Tensor, Tensor]:
    vocab = model.causal_lm.vocabulary
    ids = torch.arange(rows * length).reshape(rows, length) % vocab
    return ids, torch.ones_like(ids)
