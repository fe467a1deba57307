"""The learning rate of each optimizer step. It depends on the step alone, so a checkpoint holds no state of it."""

from __future__ import annotations

import math

from gircse.train.run_config import RunConfig


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then linear decay.

    With W = ceil(warmup_ratio * total_steps) it is ``peak * (step + 1) / W`` in the first W steps, so that every step
    trains. Then it decays linearly and would reach zero after the last step.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total_steps - step) / (total_steps - warmup)
