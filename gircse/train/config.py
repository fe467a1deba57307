"""Every setting of a training run, its default and its meaning, in one dataclass; the command line is made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gircse.lm.soft_token_gradient import SoftTokenGradient
from gircse.train.run_config import RunConfig
from gircse.train.settings import setting

if TYPE_CHECKING:
    from gircse.lm.config import GircseConfig


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of `gircse.train.train`. Defaults are the paper's (docs/method.md §7) where it gives one."""

    command: ClassVar[str] = "train"
    free_on_resume: ClassVar[frozenset[str]] = RunConfig.free_on_resume | {"eval_every", "fsdp", "model", "adapter"}
    unsaved: ClassVar[Mapping[str, Any]] = {"soft_token_gradient": 1.0}

    model: str = setting("", "base model: folder or hub name")
    adapter: str | None = setting(
        None, "saved LoRA folder to go on training, on `model` or on the base that it names; default: fresh LoRA"
    )
    weights: tuple[float, ...] = setting((), "share of the batches of each of `data`; default: by its number of rows")
    instructions: tuple[str, ...] = setting(
        (), 'instruction of each of `data` for rows without "prompt", "" for none; default: such rows are an error'
    )
    batching: str = setting("homogeneous", "rows of a batch: 'homogeneous' (all of one of `data`) or 'mixed'")
    num_steps: int | str = setting(
        5, "K, soft tokens per text, or a range such as 3:10, drawn per batch; 0 trains the encoder-only baseline"
    )
    inference_steps: int | None = setting(
        None, "K that the saved model encodes with; default: num_steps, or the end of its range"
    )
    soft_token_gradient: float | str = setting(
        0.0,
        "factor on the gradient of each soft token: 0 (constants in backward, steps by the block) to 1 (the paper's), "
        "or a schedule: 0:1@0.5 goes from 0 to 1 over the first half of the steps",
    )
    stepwise: bool = setting(True, "contrastive loss on every step; without it on the last embedding only")
    reg_weight: float = setting(1.0, "lambda, weight of the penalty on steps that get worse")
    detach_previous: bool = setting(False, "the penalty holds each step to the one before as a constant")
    reduction: str = setting("mean", "losses over steps: 'mean' (the reference code) or 'sum' (the paper's formula)")
    contrastive_temperature: float = setting(0.02, "tau of the contrastive loss")
    include_queries: bool = setting(False, "the other queries of a batch are negatives too")
    symmetric: bool = setting(False, "the mean of this loss and that of each positive among all queries")
    filter_false_negatives: bool = setting(
        True, "candidates that are a row's query, or a positive of any row with it, do not count for it"
    )
    pooling: str = setting("mean", "steps to embedding: mean, last or weighted")
    temperature: float = setting(1.0, "logit temperature T of the soft tokens")
    append_eos: bool = setting(False, "append the end-of-sequence token to every prompt")
    include_prompt_state: bool = setting(False, "pool the prompt's last state as the first of the K")
    eval_every: int | None = setting(None, "steps between evaluations; default: only at the end")
    fsdp: bool = setting(
        False, "share the frozen decoder layers out over the processes (FSDP2), for a base that is too large"
    )
    quantization: str | None = setting(None, "bitsandbytes weights of the frozen base: 'nf4' (4 bits) or 'int8'")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("num_steps", _step_range(self.num_steps) is not None, "an integer >= 0 or a range such as '3:10'")
        self.expect_integers("inference_steps", least=0)
        SoftTokenGradient.of(self.soft_token_gradient)  # checks it
        self.gircse_config()  # checks pooling, temperature, append_eos and the like
        self.expect_integers("eval_every")
        self.expect_positive("contrastive_temperature")
        self.expect_not_negative("reg_weight")
        self.expect("quantization", self.quantization in (None, "nf4", "int8"), "'nf4', 'int8' or None")
        self.expect("fsdp", not (self.fsdp and self.quantization), "False with a quantised base")
        self.expect("reduction", self.reduction in ("mean", "sum"), "'mean' or 'sum'")
        self.expect("batching", self.batching in ("homogeneous", "mixed"), "'homogeneous' or 'mixed'")
        self.expect("weights", all(0 < weight < float("inf") for weight in self.weights), "numbers > 0")
        if self.adapter is not None:
            self.expect_no_lora_settings("`adapter`, which has its own")
        for name in ("weights", "instructions"):
            given = len(getattr(self, name))
            fits = not given or not self.data or given == len(self.data)
            self.expect(name, fits, f"one for each of the {len(self.data)} of data")

    @property
    def max_num_steps(self) -> int:
        """The largest K that a batch can have."""
        return self._steps()[1]

    def steps_at(self, step: int) -> int:
        """K of the batch of a step (from 0): a function of (seed, step); in a range each is as likely as the others."""
        # imported here because it needs numpy, which `--help` is to do without
        from gircse.data.sampling import draw_number

        low, high = self._steps()
        return draw_number(low, high, seed=self.seed, step=step)

    def _steps(self) -> tuple[int, int]:
        steps = _step_range(self.num_steps)
        assert steps is not None
        return steps

    def soft_token_gradient_at(self, step: int, total_steps: int) -> float:
        """The factor of a step (from 0)."""
        return SoftTokenGradient.of(self.soft_token_gradient).at(step, total_steps)

    @property
    def max_soft_token_gradient(self) -> float:
        """The largest factor that a step can have."""
        return SoftTokenGradient.of(self.soft_token_gradient).largest

    def gircse_config(self) -> GircseConfig:
        """The part that belongs to the model and is saved with it."""
        # imported here because it needs torch, which `--help` is to do without
        from gircse.lm.config import GircseConfig

        return GircseConfig(
            num_steps=self.max_num_steps if self.inference_steps is None else self.inference_steps,
            pooling=self.pooling,
            temperature=self.temperature,
            append_eos=self.append_eos,
            include_prompt_state=self.include_prompt_state,
            query_max_length=self.query_max_length,
            passage_max_length=self.passage_max_length,
        )

    @property
    def eval_instruction(self) -> str | None:
        """What stands in for `eval_data`'s rows without "prompt": the one of `instructions` where all are the same."""
        return self.instructions[0] if len(set(self.instructions)) == 1 else None


def _step_range(num_steps: int | str) -> tuple[int, int] | None:
    """First and last K of an integer or of a range "3:10"; None if it is neither."""
    if isinstance(num_steps, int):
        return (num_steps, num_steps) if num_steps >= 0 else None
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", num_steps)
    low, high = map(int, match.groups()) if match else (0, 0)
    return (low, high) if 1 <= low <= high else None
