"""The encodings and training steps of the GPU suite, and what they are held to, for each number of steps K."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import Target


@dataclass(frozen=True)
class Encoding:
    """Encoding `batch` texts of `length` tokens: official-style evaluation against the generation engine.

    Attributes:
        shape: a name of `bench.shapes.SHAPES`; weights are random.
        targets: of each K that is timed.
        baseline: whether official-style evaluation is timed too.
        layers: depth, None for all.
        seconds: about how long it takes on an H100, checks included, once the model is there.
    """

    shape: str
    batch: int
    length: int
    targets: dict[int, Target]
    seconds: float
    baseline: bool = True
    layers: int | None = None
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        return f"encode-{self.shape}-B{self.batch}-N{self.length}"


@dataclass(frozen=True)
class TrainStep:
    """One training step of `queries` x (1 query + 2 passages) texts of `length` tokens with LoRA: the reference
    algorithm with checkpointing against ours.

    Attributes:
        shape, targets, layers, seconds: as those of an `Encoding`.
    """

    shape: str
    queries: int
    length: int
    targets: dict[int, Target]
    seconds: float
    layers: int | None = None
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        return f"train-{self.shape}-Q{self.queries}-N{self.length}"


_ANY = Target()

# In the order of their worth: whatever time is left, the head of this list is measured.
ENCODINGS: list[Encoding] = [
    Encoding("qwen2.5-0.5b", 64, 32, {0: Target(milliseconds=8), 5: _ANY, 20: Target(10, milliseconds=36)}, 12),
    Encoding("qwen2.5-0.5b", 512, 32, {0: _ANY, 5: _ANY, 20: Target(5, milliseconds=75)}, 12),
    Encoding("qwen2.5-0.5b", 1, 32, {0: _ANY, 20: Target(milliseconds=30)}, 8),
    Encoding("mistral-7b", 64, 512, {0: Target(milliseconds=740), 5: _ANY, 20: Target(milliseconds=880)}, 45),
    Encoding("qwen2.5-0.5b", 512, 512, {0: _ANY, 20: Target(over_zero=1.25)}, 15, baseline=False),
]
TRAINING: list[TrainStep] = [
    TrainStep("qwen2.5-0.5b", 8, 512, {0: _ANY, 5: Target(20, over_floor=3, over_zero=1.25)}, 25),
    TrainStep("mistral-7b", 4, 512, {0: _ANY, 5: Target(5, over_floor=1.6, over_zero=1.25)}, 70),
]

# The suite's dry run. The bounds are made up: one that is met, one that is not.
SMOKE_ENCODINGS = [
    Encoding("smollm2-135m", 2, 8, {0: _ANY, 2: Target(1e9, milliseconds=1e9)}, 5, layers=1, dtype="float32")
]
SMOKE_TRAINING = [
    TrainStep("smollm2-135m", 2, 8, {0: _ANY, 2: Target(1e9, over_zero=1e9)}, 5, layers=1, dtype="float32")
]
