"""The encodings and training steps of the GPU suite, and what they are held to, for each number of steps K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Target


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """What is timed with the random weights of one shape.

    Attributes:
        shape: a name of `bench.shapes.SHAPES`.
        length: tokens of every text.
        targets: of each K that is timed.
        seconds: about how long it takes on an H100, checks included, once the model is there.
        layers: depth, None for all.
        dtype: of the model, a name of torch's.
    """

    shape: str
    length: int
    targets: dict[int, Target]
    seconds: float
    layers: int | None = None
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Encoding(ModelCase):
    """Encoding `batch` texts: official-style evaluation (unless `baseline` is False) against the generation engine."""

    batch: int
    baseline: bool = True

    @property
    def name(self) -> str:
        return f"encode-{self.shape}-B{self.batch}-N{self.length}"


@dataclass(frozen=True, kw_only=True)
class TrainStep(ModelCase):
    """One training step of `queries` x (1 query + 2 passages) texts with LoRA: the reference algorithm with
    checkpointing against ours."""

    queries: int

    @property
    def name(self) -> str:
        return f"train-{self.shape}-Q{self.queries}-N{self.length}"


_ANY = Target()
_SMALL, _LARGE = "qwen2.5-0.5b", "mistral-7b"


def _encoding(shape: str, batch: int, length: int, seconds: float, targets: dict[int, Target], **more: Any) -> Encoding:
    return Encoding(shape=shape, batch=batch, length=length, seconds=seconds, targets=targets, **more)


def _step(shape: str, queries: int, length: int, seconds: float, targets: dict[int, Target], **more: Any) -> TrainStep:
    return TrainStep(shape=shape, queries=queries, length=length, seconds=seconds, targets=targets, **more)


# In the order of their worth: whatever time is left, the head of this list is measured.
ENCODINGS = [
    _encoding(_SMALL, 64, 32, 12, {0: Target(milliseconds=8), 5: _ANY, 20: Target(10, milliseconds=36)}),
    _encoding(_SMALL, 512, 32, 12, {0: _ANY, 5: _ANY, 20: Target(5, milliseconds=75)}),
    _encoding(_SMALL, 1, 32, 8, {0: _ANY, 20: Target(milliseconds=30)}),
    _encoding(_LARGE, 64, 512, 45, {0: Target(milliseconds=740), 5: _ANY, 20: Target(milliseconds=880)}),
    _encoding(_SMALL, 512, 512, 15, {0: _ANY, 20: Target(over_zero=1.25)}, baseline=False),
]
TRAINING = [
    _step(_SMALL, 8, 512, 25, {0: _ANY, 5: Target(20, over_floor=3, over_zero=1.25)}),
    _step(_LARGE, 4, 512, 70, {0: _ANY, 5: Target(5, over_floor=1.6, over_zero=1.25)}),
]

# The suite's dry run. The bounds are made up: one that is met, one that is not.
_CUT: dict[str, Any] = {"layers": 1, "dtype": "float32"}
SMOKE_ENCODINGS = [_encoding("smollm2-135m", 2, 8, 5, {0: _ANY, 2: Target(1e9, milliseconds=1e9)}, **_CUT)]
SMOKE_TRAINING = [_step("smollm2-135m", 2, 8, 5, {0: _ANY, 2: Target(1e9, over_zero=1e9)}, **_CUT)]
