"""The triton backend of ``soft_embed``: the kernels' launchers behind the seam of ``soft_embed_torch``."""

from __future__ import annotations

from typing import Any

from gircse_kernels.contract import Candidates, Forward, Grads, Inputs, Needs, Options, Saved, Selection, Truncation
from torch import Tensor

from . import soft_embed_torch
from .backends import kernels
from .soft_embed_torch import OnlineState


def takes(inputs: Inputs) -> bool:
    """Whether the kernels compute this call; the torch backend computes the others."""
    alike = inputs.head is None or inputs.values.dtype == inputs.hidden.dtype
    return alike and inputs.num_vocab > 0 and (inputs.head is not None or inputs.bias_ids is None)


def select(inputs: Inputs, options: Options, rules: Truncation, capacity: int) -> Selection:
    """What the rules keep of each row of a whole vocabulary, as ``selection.select``, with all statistics."""
    return kernels().select(inputs, options, rules, capacity)


def candidates(inputs: Inputs, options: Options, capacity: int) -> Candidates:
    """The ``capacity`` highest scores of each row of this shard, and mergeable sums; ids of the whole vocabulary."""
    found = kernels().candidates(inputs, options, capacity)
    return found._replace(ids=found.ids + options.vocab_start, argmax=found.argmax + options.vocab_start)


def forward(inputs: Inputs, options: Options, *, stats: bool, exact: bool, keep: bool = False) -> Forward:
    """As ``soft_embed_torch.forward``; with ``keep`` also the probabilities, as far as the plan's budget allows."""
    return kernels().forward(inputs, options, stats=stats, exact=exact, keep=keep)


def scan(inputs: Inputs, options: Options, *, stats: bool) -> OnlineState:
    """As ``soft_embed_torch.scan``."""
    sums: Any = kernels().forward(inputs, options, stats=stats, finish=False)
    moment, argmax = (None if tensor is None else tensor[:, None] for tensor in (sums.entropy, sums.argmax))
    return OnlineState(sums.peak[:, None], sums.total[:, None], sums.out, moment, argmax)


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Grads:
    """As ``soft_embed_torch.backward``."""
    if grad_out is not None:
        grad_out = grad_out.to(inputs.values.dtype)
    if inputs.bias_ids is not None and inputs.ids is None:  # the kernels have scores that are not the logits' alone
        return soft_embed_torch.backward(grad_out, grad_lse, grad_entropy, inputs, saved, options, needs)
    return kernels().backward(grad_out, grad_lse, grad_entropy, inputs, saved, options, needs)
