"""A model whose training steps' memory is known at any depth and number of rows, counted on small ones.

`gircse.train.plan.meta_step` runs a step operator by operator, which takes a second for three layers. What it counts is
affine in the number of layers and of rows, in each part of the step by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gircse.lm.quiet import quiet_peft
from gircse.roofline import ModelFacts
from gircse.train.config import TrainConfig
from gircse.train.plan.meta_step import Batch, StepMemory, step_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class TracedModel:
    """A model on the meta device whose steps' memory is known: counted at two depths, and the rest of the layers added.

    Attributes:
        base: the whole one, with LoRA, for its parameters.
        facts: of the plain model.
        cut: the two shallow ones; the whole one alone where it is not deeper.
        times: how many times their difference must be added to the first.
    """

    base: Any
    facts: ModelFacts
    cut: tuple[Any, ...]
    times: float

    @classmethod
    def of(cls, config: TrainConfig, model_config: PretrainedConfig | None = None) -> TracedModel:
        """The base of a run, with LoRA and, if wanted, checkpointing, in train mode."""
        from transformers import AutoConfig

        if model_config is None:
            model_config = AutoConfig.from_pretrained(config.model)
        base, facts = _meta_base(config, model_config)
        period = _period(getattr(model_config, "layer_types", None))
        near, far = 2 * period, 3 * period  # the first and the last layer are not like those between
        if facts.layers <= far:
            return cls(base, facts, (base,), 0.0)
        cut = tuple(_meta_base(config, _cut(model_config, depth))[0] for depth in (near, far))
        return cls(base, facts, cut, (facts.layers - near) / (far - near))

    def memory(
        self,
        batches: Sequence[Batch],
        num_steps: int,
        *,
        cuda: bool = True,
        loss_bytes: int = 0,
        any_rows: bool = False,
    ) -> StepMemory:
        """See `step_memory`."""
        found = [
            step_memory(base, batches, num_steps, cuda=cuda, loss_bytes=loss_bytes, any_rows=any_rows)
            for base in self.cut
        ]
        return found[0] if len(found) == 1 else found[0].extrapolated(found[1], self.times)


@dataclass(frozen=True)
class StepRows:
    """The memory of a rollout's step as a function of its rows: that of one and of two."""

    one: StepMemory
    two: StepMemory

    @classmethod
    def of(cls, model: TracedModel, length: int, num_steps: int) -> StepRows:
        return cls(*(model.memory([Batch(rows, length)], num_steps, any_rows=True) for rows in (1, 2)))

    def memory(self, rows: int) -> StepMemory:
        return self.one.extrapolated(self.two, rows - 1)

    def largest(self, room: float) -> int:
        """The most rows whose peak stays below `room` bytes."""
        rows = [
            1 + (room - one) // (two - one)
            for one, two in zip(self.one.moments, self.two.moments, strict=True)
            if two > one
        ]
        return max(0, int(min(rows)))


def _meta_base(config: TrainConfig, model_config: PretrainedConfig) -> tuple[Any, ModelFacts]:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from gircse.train.lora import lora_config

    dtype = getattr(model_config, "dtype", None) if config.dtype == "auto" else config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype or torch.float32)
    facts = ModelFacts.of(base)
    with quiet_peft():
        get_peft_model(base, lora_config(base, config)).train()  # puts the adapters into `base` itself
    if config.gradient_checkpointing:
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": False})
    return base, facts


def _period(layer_types: Sequence[str] | None) -> int:
    """After how many layers their types repeat."""
    types = list(layer_types or [""])
    return next(p for p in range(1, len(types) + 1) if all(a == b for a, b in zip(types, types[p:], strict=False)))


def _cut(model_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config
