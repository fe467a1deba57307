"""The update of a step: the gradient clipped, AdamW in one kernel, and one wait of the host, after both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def adamw(parameters: Sequence[Tensor], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW whose steps are one operator for all parameters, on the CPU too.

    That operator does not count its writes in the parameters' versions, by which copies of weights are found to be old
    (`gircse.lm.lora`, `gircse.lm.merged_adapter`). So every step of this optimizer counts them.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(parameters))
    return optimizer


def clipped_step(
    optimizer: torch.optim.AdamW, parameters: Sequence[Tensor], loss: Tensor, max_norm: float
) -> tuple[float, float]:
    """Clips the gradient to `max_norm` and lets the optimizer, of `adamw`, take its step.

    Parameters and moments stay as they are where the loss or the norm is not finite. The device sees to that itself, so
    that the host need not wait for the two before it starts the optimizer; only the optimizer of sharded parameters
    takes no such flag, and there the host waits first.

    Returns:
        The loss and the norm of the gradient before it was clipped.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    sharded = isinstance(norm, DTensor)
    both = torch.stack([loss.detach().double(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()])
    if not sharded:
        # what `torch.amp.GradScaler` sets, too
        optimizer.found_inf = 1 - both.isfinite().all().float()  # type: ignore[attr-defined]
        optimizer.step()
    found = both.tolist()
    if sharded and all(map(math.isfinite, found)):
        optimizer.step()
    return found[0], found[1]
