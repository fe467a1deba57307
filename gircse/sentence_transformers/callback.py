"""A schedule of the gradient at the soft token, for `SentenceTransformerTrainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from gircse.lm.soft_token_gradient import SoftTokenGradient
from gircse.sentence_transformers.losses import GIRCSELoss


class SoftTokenGradientCallback(TrainerCallback):
    """Sets the factor of a loss before each step of a trainer, a resumed one included.

    Args:
        loss: the loss that the trainer was given (not a `MatryoshkaLoss` around it).
        schedule: a schedule such as "0:1@0.5": from 0 to 1 over the first half of the steps.

    Raises:
        ValueError: no schedule.
    """

    def __init__(self, loss: GIRCSELoss, schedule: float | str) -> None:
        self._loss, self._schedule = loss, SoftTokenGradient.of(schedule)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._loss.soft_token_gradient = self._schedule.at(state.global_step, state.max_steps)
