"""What `bench/quality.py` trains, in the order in which it matters, and at which scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gircse.train.config import TrainConfig

_ENCODER: Mapping[str, Any] = {"num_steps": 0}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        what: one line for the table.
        settings: what differs from the scale's `TrainConfig`.
        budget: steps, as a multiple of the scale's.
        drafter: of the soft tokens (`bench.quality_drafters`); "": by definition.
        soft_temperature: logit temperature T of the soft tokens, in training and encoding.
        teacher: arm whose embeddings it is distilled from.
        from_teacher: it starts from the teacher's adapter.
    """

    name: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: int = 1
    drafter: str = ""
    soft_temperature: float = 1.0
    teacher: str = ""
    from_teacher: bool = False


def _factor(value: float | str, **more: Any) -> dict[str, Any]:
    return {"soft_token_gradient": value, **more}


_TEN = {"num_steps": 10}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("ten-steps-long", "K = 10 by the block, twice the steps", _TEN, budget=2),
        Arm("distilled", "K = 0, from ten-steps-long", _ENCODER, teacher="ten-steps-long", from_teacher=True),
        Arm("distilled-fresh", "K = 0, from ten-steps-long, new adapter", _ENCODER, teacher="ten-steps-long"),
        Arm("factor-1", "K = 5, the paper's gradient", _factor(1.0)),
        Arm("factor-0.1", "K = 5, a tenth of the gradient at the soft token", _factor(0.1)),
        Arm("block", "K = 5 by the block (factor 0)"),
        Arm("ten-steps", "K = 10 by the block", _TEN),
        Arm("encoder-only", "K = 0", _ENCODER),
        Arm("encoder-only-long", "K = 0, twice the steps", _ENCODER, budget=2),
        Arm("encoder-only-longer", "K = 0, four times the steps", _ENCODER, budget=4),
        Arm("one-step", "K = 1", {"num_steps": 1}),
        Arm("temperature-2", "K = 5 by the block, temperature 2 at the soft token", soft_temperature=2.0),
        Arm("new-part", "K = 5 by the block, new part of the state alone fed back", drafter="new-part"),
        Arm("dropped-keys", "K = 5 by the block, half of the prompt's keys hidden", drafter="dropped-keys"),
        Arm("block-long", "K = 5 by the block, twice the steps", budget=2),
        Arm("schedule", "K = 5, factor from 0 to 1 over the first half", _factor("0:1@0.5")),
        Arm("factor-0.3", "K = 5, factor 0.3", _factor(0.3)),
        Arm("factor-0.03", "K = 5, factor 0.03", _factor(0.03)),
        Arm("range", "K from 3..10 by the block", {"num_steps": "3:10"}),
        Arm("penalty", "K = 5 by the block, penalty on steps that get worse", {"reg_weight": 1.0}),
        Arm("range-penalty", "K from 3..10 by the block, penalty", {"num_steps": "3:10", "reg_weight": 1.0}),
        Arm("twenty-steps", "K = 20 by the block", {"num_steps": 20}),
        Arm("factor-1-long", "K = 5, the paper's gradient, twice the steps", _factor(1.0), budget=2),
        Arm("paper", "K = 5, the paper's gradient and penalty", _factor(1.0, reg_weight=1.0)),
        Arm("paper-long", "the same, twice the steps", _factor(1.0, reg_weight=1.0), budget=2),
        Arm("ten-steps-longer", "K = 10 by the block, four times the steps", _TEN, budget=4),
    )
}
MOST_BUDGET = max(arm.budget for arm in ARMS.values())


@dataclass(frozen=True)
class Scale:
    """How large the study is: texts of the test set, and the `TrainConfig` that all arms start from."""

    queries: int
    documents: int
    pairs: int
    train: Mapping[str, Any]

    def config(self, arm: Arm, **more: Any) -> TrainConfig:
        values = {**self.train, **arm.settings}
        return TrainConfig(**{**values, "max_steps": values["max_steps"] * arm.budget, **more})


_TRAIN = {
    "num_steps": 5,
    "soft_token_gradient": 0.0,
    "reg_weight": 0.0,
    "learning_rate": 5e-4,
    "warmup_ratio": 0.1,
    "lora_dropout": 0.0,
}

SCALES = {
    "small": Scale(
        240,
        360,
        400,
        {**_TRAIN, "max_steps": 40, "batch_size": 16, "query_max_length": 32, "passage_max_length": 32},
    ),
    "large": Scale(
        1000,
        1800,
        1200,
        {**_TRAIN, "max_steps": 600, "batch_size": 64, "query_max_length": 64, "passage_max_length": 128},
    ),
    # seconds, with a tiny model: for tests
    "tiny": Scale(
        12, 60, 16, {**_TRAIN, "max_steps": 2, "batch_size": 4, "query_max_length": 40, "passage_max_length": 12}
    ),
}
