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
        section: "engine": encoding, official-style evaluation (unless `baseline` is False) against the generation
            engine. "training": a step of 1 query + 2 passages a row with LoRA, the reference algorithm with
            checkpointing against our rollout, both eager. "train": such a step as `gircse train` makes it
            (`bench.suite.train_steps`). "step": the captured decode step alone (`bench.suite.steps`); K = 1.
        shape: a name of `bench.shapes.SHAPES`.
        rows: texts of an encoding, queries of a training step.
        length: tokens of every text.
        targets: of each K that is timed.
        seconds: about how long it takes on an H100, checks included, once the model is there.
        layers: depth, None for all.
        dtype: of the model, a name of torch's.
        compared: the K at which the reference algorithm is timed, too ("train").
        exact: target of the largest of them with the gradient through the soft tokens ("train"); None: not timed.
    """

    section: str
    shape: str
    rows: int
    length: int
    seconds: float
    targets: dict[int, Target]
    baseline: bool = True
    layers: int | None = None
    dtype: str = "bfloat16"
    compared: tuple[int, ...] = ()
    exact: Target | None = None

    @property
    def name(self) -> str:
        names = {"training": ("train", "Q"), "train": ("train-step", "Q"), "engine": ("encode", "B")}
        kind, letter = names.get(self.section, ("step", "B"))
        return f"{kind}-{self.shape}-{letter}{self.rows}-N{self.length}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def _case(section: str, shape: str, rows: int, length: int, seconds: float, **more: Any) -> ModelCase:
    targets = dict(sorted((int(key[1:]), more.pop(key)) for key in list(more) if key[0] == "k"))
    return ModelCase(section=section, shape=shape, rows=rows, length=length, seconds=seconds, targets=targets, **more)


_ANY = Target()
_SMALL, _LARGE = "qwen2.5-0.5b", "mistral-7b"
# In the order of their worth: whatever time is left, the head of this list is measured.
MODEL_CASES = [
    _case("engine", _SMALL, 64, 32, 12, k0=Target(milliseconds=8), k20=Target(10, milliseconds=36)),
    _case("engine", _SMALL, 512, 32, 12, k0=_ANY, k20=Target(5, milliseconds=75)),
    _case("engine", _SMALL, 1, 32, 8, k0=_ANY, k20=Target(milliseconds=30)),
    _case("step", _SMALL, 64, 40, 8, k1=Target(milliseconds=1.2)),
    _case("engine", _LARGE, 64, 512, 45, k0=Target(milliseconds=740), k20=Target(milliseconds=880)),
    _case("step", _LARGE, 64, 520, 12, k1=Target(milliseconds=6.6)),
    _case("engine", _SMALL, 512, 512, 15, k0=_ANY, k20=Target(over_zero=1.25), baseline=False),
    _case(
        "train",
        _SMALL,
        8,
        512,
        30,
        k0=_ANY,
        k5=Target(20, over_floor=3, over_zero=1.25),
        k20=Target(over_zero=1.5),
        compared=(0, 5),
        exact=Target(8),
    ),
    _case("train", _SMALL, 64, 32, 15, k0=_ANY, k5=Target(8), compared=(5,)),
    _case("training", _SMALL, 8, 512, 25, k0=_ANY, k5=_ANY),
    _case("train", _LARGE, 4, 512, 60, k0=_ANY, k5=Target(5, over_floor=1.6, over_zero=1.25), compared=(5,)),
]
# The suite's dry run. The bounds are made up: one that is met, one that is not.
_CUT: dict[str, Any] = {"layers": 1, "dtype": "float32", "k0": _ANY}
SMOKE_MODEL_CASES = [
    _case("engine", "smollm2-135m", 2, 8, 5, k2=Target(1e9, milliseconds=1e9), **_CUT),
    _case("training", "smollm2-135m", 2, 8, 5, k2=Target(1e9, over_zero=1e9), **_CUT),
    _case("step", "smollm2-135m", 2, 8, 5, layers=1, dtype="float32", k1=Target(milliseconds=1e9)),
    _case("train", "smollm2-135m", 2, 8, 5, k2=Target(1e-9), compared=(2,), exact=Target(1e-9), **_CUT),
]
