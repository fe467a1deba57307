"""The learning rate of each optimizer step: a function of the step alone, so that a run has no schedule to save."""

from __future__ import annotations

import math

import torch


def learning_rate(peak: float, step: int, *, total_steps: int, warmup_ratio: float) -> float:
    """Of optimizer step `step` (from 0): with W = ceil(warmup_ratio * total_steps), ``peak * (step + 1) / W`` in the
    first W steps, so that the first one trains already, then a linear decay that reaches zero after the last step."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total_steps - step) / (total_steps - warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
