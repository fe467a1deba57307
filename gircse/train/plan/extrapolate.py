"""The memory of a training step at any depth and number of rows, extrapolated from small ones.

`gircse.train.plan.meta_step` runs a step operator by operator, which takes a second for three layers. Its counts are
affine in the number of layers and of rows, for each part of the step separately.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gircse.lm.lora import fuse_lora
from gircse.roofline import ModelFacts
from gircse.train.checkpointing import keep_first_checkpoints
from gircse.train.config import TrainConfig
from gircse.train.lora import add_lora
from gircse.train.plan.meta_step import PromptShape, StepMemory, step_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class TracedModel:
    """A model on the meta device and two shallow cuts of it, whose difference is the memory of the layers between.

    Attributes:
        base: the whole model with LoRA, for its parameters.
        facts: of the plain model.
        cut: the two shallow models; the whole model alone where it is not deeper.
        times: how many times the difference of the cuts is added to the first.
        captured: its passes become CUDA graphs.
        counted: what `memory` has returned.
    """

    base: Any
    facts: ModelFacts
    cut: tuple[Any, ...]
    times: float
    captured: bool = False
    counted: dict[tuple, StepMemory] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: TrainConfig, model_config: PretrainedConfig | None = None, *, captured: bool = False
    ) -> TracedModel:
        """The base of a run with LoRA, in train mode, with the config's checkpointing."""
        from transformers import AutoConfig

        if model_config is None:
            model_config = AutoConfig.from_pretrained(config.model)
        base, facts = _meta_base(config, model_config)
        period = _period(getattr(model_config, "layer_types", None))
        near, far = 2 * period, 3 * period  # the first and the last layer differ from those between
        if facts.layers <= far:
            return cls(base, facts, (base,), 0.0, captured)
        cut = tuple(_meta_base(config, _cut(model_config, depth))[0] for depth in (near, far))
        return cls(base, facts, cut, (facts.layers - near) / (far - near), captured)

    def memory(
        self,
        prompts: Sequence[PromptShape],
        num_steps: int,
        soft_token_gradient: float,
        *,
        cuda: bool = True,
        loss_bytes: int = 0,
        any_rows: bool = False,
    ) -> StepMemory:
        """See `step_memory`. What was counted once is not counted again."""
        key = tuple(prompts), num_steps, soft_token_gradient, cuda, loss_bytes, any_rows
        if key in self.counted:
            return self.counted[key]
        near, *far = [
            step_memory(
                base,
                prompts,
                num_steps,
                soft_token_gradient,
                cuda=cuda,
                captured=self.captured,
                loss_bytes=loss_bytes,
                any_rows=any_rows,
            )
            for base in self.cut
        ]
        self.counted[key] = near.extrapolated(far[0], self.times) if far else near
        return self.counted[key]


class PartlyCheckpointed:
    """A model whose first layers are checkpointed, while the others keep their activations.

    Args:
        traced: -> the model with this number of checkpointed layers, None for all.
        layers: that number.
    """

    def __init__(self, traced: Callable[[int | None], TracedModel], layers: int | None) -> None:
        self._models = [traced(count) for count in ((0, 1, None) if layers else (layers,))]
        self._layers = layers
        self.base, self.facts = self._models[0].base, self._models[0].facts

    def memory(self, prompts: Sequence[PromptShape], *sizes: Any, **options: Any) -> StepMemory:
        """See `TracedModel.memory`."""
        found = [model.memory(prompts, *sizes, **options) for model in self._models]
        return partly_checkpointed(*found, layers=self._layers) if self._layers else found[0]


def partly_checkpointed(none: StepMemory, one: StepMemory, every: StepMemory, *, layers: int) -> StepMemory:
    """The memory with some checkpointed layers, from that with none, with one and with all of them.

    Every layer saves as much as the first, until one layer's second pass needs more than the others keep.
    """
    return none.extrapolated(one, layers).at_least(every)


@dataclass(frozen=True)
class StepRows:
    """The memory of a step as a function of its rows, from that of one row and of two."""

    one: StepMemory
    two: StepMemory

    @classmethod
    def of(cls, model: PartlyCheckpointed, length: int, num_steps: int, soft_token_gradient: float) -> StepRows:
        return cls(
            *(
                model.memory([PromptShape(rows, length)], num_steps, soft_token_gradient, any_rows=True)
                for rows in (1, 2)
            )
        )

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
    from transformers import AutoModelForCausalLM

    dtype = getattr(model_config, "dtype", None) if config.dtype == "auto" else config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype or torch.float32)
    facts = ModelFacts.of(base)
    fuse_lora(add_lora(base, config).train())  # which changes `base` itself
    if config.gradient_checkpointing:
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": False})
        keep_first_checkpoints(base, config)
    return base, facts


def _period(layer_types: Sequence[str] | None) -> int:
    """The number of layers after which their types repeat."""
    types = list(layer_types or [""])
    return next(p for p in range(1, len(types) + 1) if all(a == b for a, b in zip(types, types[p:], strict=False)))


def _cut(model_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config
