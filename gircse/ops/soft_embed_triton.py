"""The triton backend of ``soft_embed``: the kernels' launchers behind the seam of ``soft_embed_torch``."""

from __future__ import annotations

from typing import Any

from gircse_kernels.contract import Forward, Grads, Inputs, Needs, Options, Saved
from torch import Tensor

from .backends import kernels
from .soft_embed_torch import OnlineState


def takes(inputs: Inputs, options: Options) -> bool:
    """Whether the kernels compute this call; the torch backend computes the others."""
    noise = inputs.seeds is not None or options.seed is not None
    by_row = noise and (inputs.noise_scale is not None or inputs.temperature is not None)
    alike = inputs.head is None or inputs.values.dtype == inputs.hidden.dtype
    return alike and inputs.num_vocab > 0 and not by_row and inputs.bitmask is None and inputs.bias_ids is None


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
    return kernels().backward(grad_out, grad_lse, grad_entropy, inputs, saved, options, needs)
