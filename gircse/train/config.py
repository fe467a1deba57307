"""Every knob of a training run, its default and its meaning, in one dataclass; the command line is made from it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gircse.train.settings import Knobs
from gircse.train.settings import knob as _knob

if TYPE_CHECKING:
    from gircse.lm.config import GircseConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCHINGS = ("homogeneous", "mixed")

# What may differ between a run and its continuation: where it writes, how often, and how it looks.
_FREE_ON_RESUME = frozenset(
    {"output", "resume", "save_every", "keep_checkpoints", "eval_every", "eval_data", "progress", "device"}
    | {"micro_batch_tokens", "fsdp", "wandb", "rank_timeout"}
    | {"max_steps"}  # a run may become longer: `gircse.train.run_folder.check_data`
)


@dataclass(frozen=True)
class TrainConfig(Knobs):
    """Settings of `gircse.train.train`. Defaults are the paper's (docs/method.md §7) where it gives one."""

    model: str = _knob("", "base model: folder or hub name")
    adapter: str | None = _knob(
        None, "saved LoRA folder to go on training, on `model` or on the base that it names; default: fresh LoRA"
    )
    data: tuple[str, ...] = _knob((), "training rows: JSONL files or saved `datasets` folders")
    weights: tuple[float, ...] = _knob((), "share of the batches of each of `data`; default: by its number of rows")
    instructions: tuple[str, ...] = _knob(
        (), 'instruction of each of `data` for rows without "prompt", "" for none; default: such rows are an error'
    )
    output: str = _knob("runs/train", "folder of the run")
    num_steps: int | str = _knob(
        5, "K, soft tokens per text, or a range such as 3:10, drawn per batch; 0 trains the encoder-only baseline"
    )
    inference_steps: int | None = _knob(
        None, "K that the saved model encodes with; default: num_steps, or the end of its range"
    )
    stepwise: bool = _knob(True, "contrastive loss on every step; without it on the last embedding only")
    reg_weight: float = _knob(1.0, "lambda, weight of the penalty on steps that get worse")
    detach_previous: bool = _knob(False, "the penalty holds each step to the one before as a constant")
    reduction: str = _knob("mean", "losses over steps: 'mean' (the reference code) or 'sum' (the paper's formula)")
    contrastive_temperature: float = _knob(0.02, "tau of the contrastive loss")
    include_queries: bool = _knob(False, "the other queries of a batch are negatives too")
    symmetric: bool = _knob(False, "the mean of this loss and that of each positive among all queries")
    filter_false_negatives: bool = _knob(
        True, "candidates that are a row's query, or a positive of any row with it, do not count for it"
    )
    pooling: str = _knob("mean", "steps to embedding: mean, last or weighted")
    temperature: float = _knob(1.0, "logit temperature T of the soft tokens")
    append_eos: bool = _knob(False, "append the end-of-sequence token to every prompt")
    include_prompt_state: bool = _knob(False, "pool the prompt's last state as the first of the K")
    batch_size: int = _knob(32, "rows per step; all positives and negatives of a batch are candidates")
    batching: str = _knob("homogeneous", "rows of a batch: 'homogeneous' (all of one of `data`) or 'mixed'")
    max_steps: int | None = _knob(None, "optimizer steps; default: one pass over the data")
    query_max_length: int = _knob(256, "tokens of a query; the saved model encodes with it, too")
    passage_max_length: int = _knob(2048, "tokens of a positive or negative; the saved model encodes with it, too")
    max_negatives: int | None = _knob(None, "hard negatives used per row; default: all it has")
    learning_rate: float = _knob(1e-5, "peak learning rate of AdamW")
    weight_decay: float = _knob(0.0, "weight decay of AdamW")
    warmup_ratio: float = _knob(0.03, "share of the steps that warm up; then linear decay to zero")
    max_grad_norm: float = _knob(1.0, "gradient clipping")
    lora_r: int = _knob(16, "LoRA rank")
    lora_alpha: int = _knob(64, "LoRA alpha")
    lora_dropout: float = _knob(0.1, "LoRA dropout")
    lora_targets: tuple[str, ...] = _knob(
        LORA_TARGETS, "names of the adapted layers; models without them adapt all their linear layers"
    )
    gradient_checkpointing: bool = _knob(False, "recompute the prompt pass in backward: less memory, more time")
    dtype: str = _knob("auto", "dtype of the frozen base weights; the adapter trains in float32")
    device: str | None = _knob(None, "device; default: CUDA if there is one")
    seed: int = _knob(0, "seed of the data order, the LoRA initialisation and the dropout")
    save_every: int = _knob(100, "steps between checkpoints")
    keep_checkpoints: int = _knob(2, "checkpoints kept")
    eval_every: int | None = _knob(None, "steps between evaluations; default: only at the end")
    eval_data: str | None = _knob(
        None,
        "rows to evaluate on (retrieval over their positives and negatives), at the end and every `eval_every` steps",
    )
    resume: bool = _knob(
        False,
        "go on from the newest checkpoint of `output`; on the command line with the run's settings for all others",
    )
    progress: bool = _knob(True, "show a progress bar")
    # memory and machines
    micro_batch_tokens: int | None = _knob(
        None, "memory knob: tokens (padding and K included) that go through the model at once; default: by a probe"
    )
    fsdp: bool = _knob(
        False, "share the frozen decoder layers out over the processes (FSDP2), for a base that is too large"
    )
    quantization: str | None = _knob(None, "bitsandbytes weights of the frozen base: 'nf4' (4 bits) or 'int8'")
    wandb: bool = _knob(False, "log to Weights & Biases (also where WANDB_PROJECT is set)")
    rank_timeout: float = _knob(1800.0, "seconds that a process waits for the others before the job ends")

    def __post_init__(self) -> None:
        self.check_types()
        self.expect("num_steps", _step_range(self.num_steps) is not None, "an integer >= 0 or a range such as '3:10'")
        self.expect("inference_steps", self.inference_steps is None or self.inference_steps >= 0, "an integer >= 0")
        self.expect_counts("batch_size", "query_max_length", "passage_max_length", "lora_r", "lora_alpha")
        self.gircse_config()  # checks pooling, temperature, append_eos and the like
        self.expect_counts("save_every", "keep_checkpoints", "max_steps", "eval_every", "micro_batch_tokens")
        self.expect("max_negatives", self.max_negatives is None or self.max_negatives >= 0, "an integer >= 0")
        self.expect_positive("contrastive_temperature", "learning_rate", "max_grad_norm", "rank_timeout")
        self.expect_not_negative("weight_decay", "reg_weight")
        self.expect_shares("warmup_ratio", "lora_dropout")
        self.expect("quantization", self.quantization in (None, "nf4", "int8"), "'nf4', 'int8' or None")
        self.expect("fsdp", not (self.fsdp and self.quantization), "False with a quantised base")
        self.expect("reduction", self.reduction in ("mean", "sum"), "'mean' or 'sum'")
        self.expect("batching", self.batching in BATCHINGS, "'homogeneous' or 'mixed'")
        self.expect("weights", all(0 < weight < float("inf") for weight in self.weights), "numbers > 0")
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_targets"):
            own = self.adapter is None or getattr(self, name) == getattr(TrainConfig, name)
            self.expect(name, own, "no value beside `adapter`, which has its own")
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
        from gircse.data.sampling import (
            draw_number,  # here, because it imports numpy and the command line's --help does not
        )

        low, high = self._steps()
        return draw_number(low, high, seed=self.seed, step=step)

    def _steps(self) -> tuple[int, int]:
        steps = _step_range(self.num_steps)
        assert steps is not None
        return steps

    def gircse_config(self) -> GircseConfig:
        """The part that belongs to the model and is saved with it."""
        from gircse.lm.config import (
            GircseConfig,  # here, because it imports torch and the command line's --help does not
        )

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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """The settings that `to_json` wrote. Fields that an older version did not know have their defaults.

        Raises:
            ValueError: no JSON object, an unknown key, a wrong type or value; names the file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"got {type(values).__name__}, expected an object")
            check_keys(values)
            return cls(**values)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None

    def check_continues(self, earlier: TrainConfig, *, free: Collection[str] = ()) -> None:
        """Raises ValueError naming the settings in which a resumed run differs from the run it continues; `free` ones
        may differ, too."""
        changed = [
            f"{f.name}: was {getattr(earlier, f.name)!r}, is {getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name not in _FREE_ON_RESUME | set(free) and getattr(earlier, f.name) != getattr(self, f.name)
        ]
        if changed:
            raise ValueError("resume: the run was started with other settings: " + "; ".join(changed))


def check_keys(values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first key that is no field of `TrainConfig`."""
    names = [f.name for f in fields(TrainConfig)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key.replace("-", "_"), names, 1)
            hint = (
                f"did you mean {close[0]!r}?" if close else "expected a name that `gircse train --help` lists, with _"
            )
            raise ValueError(f"{key}: no such setting, {hint}")


def _step_range(num_steps: int | str) -> tuple[int, int] | None:
    """First and last K of an integer or of a range "3:10"; None if it is neither."""
    if isinstance(num_steps, int):
        return (num_steps, num_steps) if num_steps >= 0 else None
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", num_steps)
    low, high = map(int, match.groups()) if match else (0, 0)
    return (low, high) if 1 <= low <= high else None
