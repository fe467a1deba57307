"""What `bench/quality.py` trains: the paper's ablation, attempts at step scaling, batch sizes; and at which scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gircse.train.config import TrainConfig

UNTRAINED = "untrained"
PLAIN: Mapping[str, Any] = {"stepwise": False, "reg_weight": 0.0}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        group: the table it stands in.
        settings: what differs from the scale's `TrainConfig`.
        budget: texts that it trains on, as a multiple of the others'.
    """

    name: str
    group: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: float = 1.0


ARMS = {
    arm.name: arm
    for arm in (
        Arm("encoder-only", "ablation", "K = 0: the prompt's last state, no generation", {"num_steps": 0, **PLAIN}),
        Arm("one-step", "ablation", "K = 1, loss on it alone", {"num_steps": 1, **PLAIN}),
        Arm("generation", "ablation", "K = 5, loss on the last embedding alone", PLAIN),
        Arm("stepwise", "ablation", "K = 5, loss on every step", {"reg_weight": 0.0}),
        Arm("gircse", "ablation", "K = 5, loss on every step, penalty on steps that get worse"),
        Arm("range", "scaling", "K drawn from 3..10 for each batch", {"num_steps": "3:10"}),
        Arm("range-wide", "scaling", "K drawn from 1..20 for each batch", {"num_steps": "1:20"}),
        Arm("ten-steps", "scaling", "K = 10", {"num_steps": 10}),
        Arm("last", "scaling", "each step's own state is its embedding (pooling = last)", {"pooling": "last"}),
        Arm("last-range", "scaling", "pooling = last, K drawn from 3..10", {"pooling": "last", "num_steps": "3:10"}),
        Arm("weighted", "scaling", "later steps weigh more (pooling = weighted)", {"pooling": "weighted"}),
        Arm("sum", "scaling", "losses summed over steps: the penalty weighs K times less", {"reduction": "sum"}),
        Arm("detached", "scaling", "the penalty holds the step before constant", {"detach_previous": True}),
        Arm("penalty-8", "scaling", "penalty weight 8", {"reg_weight": 8.0}),
        Arm("prompt-state", "scaling", "h_0 is the first of the K states", {"include_prompt_state": True}),
        Arm("temperature-0.05", "scaling", "contrastive temperature 0.05", {"contrastive_temperature": 0.05}),
        Arm("slow", "scaling", "a fifth of the learning rate", {"learning_rate": 1e-4}),
        Arm("long", "scaling", "twice the steps", budget=2.0),
        Arm("stepwise-long", "scaling", "no penalty, twice the steps", {"reg_weight": 0.0}, budget=2.0),
        Arm("range-long", "scaling", "K drawn from 3..10, twice the steps", {"num_steps": "3:10"}, budget=2.0),
        Arm("longer", "scaling", "four times the steps", budget=4.0),
        Arm("encoder-only-long", "budget", "K = 0, twice the steps", {"num_steps": 0, **PLAIN}, budget=2.0),
        Arm("encoder-only-longer", "budget", "K = 0, four times the steps", {"num_steps": 0, **PLAIN}, budget=4.0),
        Arm("negatives-3", "negatives", "3 negatives a query", {"batch_size": 4}),
        Arm("negatives-63", "negatives", "63 negatives a query", {"batch_size": 64}),
        Arm(
            "negatives-63-fast", "negatives", "63 negatives, twice the rate", {"batch_size": 64, "learning_rate": 1e-3}
        ),
        Arm("negatives-511", "negatives", "511 negatives a query", {"batch_size": 512}),
    )
}


@dataclass(frozen=True)
class Scale:
    """How large the study is: texts of the test set, and the `TrainConfig` that all arms start from."""

    queries: int
    documents: int
    pairs: int
    train: Mapping[str, Any]

    def config(self, arm: Arm, *, seed: int, **more: Any) -> TrainConfig:
        """Settings of a run of `arm`: with another batch size it takes more or fewer steps, over as many texts."""
        values = {**self.train, **arm.settings}
        rows = self.train["max_steps"] * self.train["batch_size"] * arm.budget
        values["max_steps"] = max(1, round(rows / values["batch_size"]))
        return TrainConfig(**values, seed=seed, **more)


_TRAIN = {
    "num_steps": 5,
    "soft_token_gradient": 1.0,
    "learning_rate": 5e-4,
    "warmup_ratio": 0.1,
    "lora_dropout": 0.0,
    "inference_steps": 5,
}

SCALES = {
    # 10 minutes a run on one core
    "small": Scale(
        240,
        360,
        400,
        {**_TRAIN, "max_steps": 40, "batch_size": 16, "query_max_length": 32, "passage_max_length": 32},
    ),
    # a few minutes a run on one H100
    "large": Scale(
        1000,
        1800,
        1200,
        {**_TRAIN, "max_steps": 600, "batch_size": 64, "query_max_length": 64, "passage_max_length": 128},
    ),
    # seconds, with a tiny model: for tests
    "tiny": Scale(
        12, 60, 16, {**_TRAIN, "max_steps": 2, "batch_size": 4, "query_max_length": 12, "passage_max_length": 12}
    ),
}
