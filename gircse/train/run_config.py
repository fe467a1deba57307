"""The settings that training and distillation share: those of the loop, its data, its LoRA and its run folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from gircse.train.settings import Settings, setting

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_Config = TypeVar("_Config", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig(Settings):
    """Base of `TrainConfig` and `DistillConfig`."""

    # The command that the settings belong to. It is also the beginning of the names of the run's files.
    command: ClassVar[str]
    # What may differ between a run and its continuation: where it writes, how often, how it looks, on what it runs, and
    # how long it is. Data and models may have moved: `gircse.train.run_folder` compares their contents.
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"output", "resume", "save_every", "keep_checkpoints", "eval_data", "progress", "device", "max_steps", "data"}
        | {"micro_batch_tokens", "wandb", "rank_timeout"}
    )
    # The values of fields that files of earlier versions do not name, where these are not the defaults of today.
    unsaved: ClassVar[Mapping[str, Any]] = {}

    data: tuple[str, ...] = setting((), "training rows: JSONL files or saved `datasets` folders")
    output: str = setting("runs/train", "folder of the run")
    batch_size: int = setting(32, "rows per step; all positives and negatives of a batch are candidates")
    max_steps: int | None = setting(None, "optimizer steps; default: one pass over the data")
    query_max_length: int = setting(256, "tokens of a query; the saved model encodes with it, too")
    passage_max_length: int = setting(2048, "tokens of a positive or negative; the saved model encodes with it, too")
    max_negatives: int | None = setting(None, "hard negatives used per row; default: all it has")
    learning_rate: float = setting(1e-5, "peak learning rate of AdamW")
    weight_decay: float = setting(0.0, "weight decay of AdamW")
    warmup_ratio: float = setting(0.03, "share of the steps that warm up; then linear decay to zero")
    max_grad_norm: float = setting(1.0, "gradient clipping")
    lora_r: int = setting(16, "LoRA rank")
    lora_alpha: int = setting(64, "LoRA alpha")
    lora_dropout: float = setting(0.1, "LoRA dropout")
    lora_targets: tuple[str, ...] = setting(
        LORA_TARGETS, "names of the adapted layers; models without them adapt all their linear layers"
    )
    gradient_checkpointing: bool = setting(False, "recompute the prompt pass in backward: less memory, more time")
    checkpointed_layers: int | None = setting(
        None, "with gradient_checkpointing, the number of layers that are recomputed (see --plan); default: all"
    )
    micro_batch_tokens: int | None = setting(
        None, "tokens (padding and K included) that go through the model at once; default: what a memory probe allows"
    )
    cuda_graphs: bool = setting(True, "on CUDA, run micro-batches of a shape that comes again as CUDA graphs")
    dtype: str = setting("auto", "dtype of the frozen base weights; the adapter trains in float32")
    device: str | None = setting(None, "device; default: CUDA if there is one")
    seed: int = setting(0, "seed of the data order, the LoRA initialisation and the dropout")
    save_every: int = setting(100, "steps between checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints kept")
    resume: bool = setting(
        False,
        "go on from the newest checkpoint of `output`; on the command line with the run's settings for all others",
    )
    eval_data: str | None = setting(None, "rows to evaluate on: retrieval over their positives and negatives")
    progress: bool = setting(True, "show a progress bar")
    wandb: bool = setting(False, "log to Weights & Biases (also where WANDB_PROJECT is set)")
    rank_timeout: float = setting(1800.0, "seconds that a process waits for the others before the job ends")

    def __post_init__(self) -> None:
        self.check_types()
        self.expect_integers("batch_size", "query_max_length", "passage_max_length", "lora_r", "lora_alpha")
        self.expect_integers("save_every", "keep_checkpoints", "max_steps", "micro_batch_tokens", "checkpointed_layers")
        alone = self.checkpointed_layers is not None and not self.gradient_checkpointing
        self.expect("checkpointed_layers", not alone, "no number without gradient_checkpointing")
        self.expect_integers("max_negatives", least=0)
        self.expect_positive("learning_rate", "max_grad_norm", "rank_timeout")
        self.expect_not_negative("weight_decay")
        self.expect_fractions("warmup_ratio", "lora_dropout")

    def expect_no_lora_settings(self, beside: str) -> None:
        """Raises ValueError for a setting of fresh LoRA that differs from its default, where it would do nothing."""
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_targets"):
            self.expect(name, getattr(self, name) == getattr(type(self), name), f"no value beside {beside}")

    def path(self, name: str) -> Path:
        """A file of the run folder: `train_config.json` for "config.json" of a training run."""
        return Path(self.output) / f"{self.command}_{name}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls: type[_Config], path: Path) -> _Config:
        """The settings that `to_json` wrote. A field that the file does not name has its value of `unsaved`,
        or its default.

        Raises:
            ValueError: the file holds no JSON object, an unknown key, a wrong type or a wrong value; names the file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"got {type(values).__name__}, expected an object")
            cls.check_names(values)
            return cls(**{**cls.unsaved, **values})
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def check_names(cls, values: Mapping[str, Any]) -> None:
        """Raises ValueError for the first key that is no setting."""
        names = [item.name for item in fields(cls)]
        for key in values:
            if key not in names:
                close = difflib.get_close_matches(key.replace("-", "_"), names, 1)
                hint = (
                    f"did you mean {close[0]!r}?"
                    if close
                    else f"expected a name that `gircse {cls.command} --help` lists, with _"
                )
                raise ValueError(f"{key}: no such setting, {hint}")

    def check_continues(self, earlier: RunConfig) -> None:
        """Raises ValueError naming the settings in which a resumed run differs from the run that it continues."""
        changed = [
            f"{item.name}: was {getattr(earlier, item.name)!r}, is {getattr(self, item.name)!r}"
            for item in fields(self)
            if item.name not in self.free_on_resume and getattr(earlier, item.name) != getattr(self, item.name)
        ]
        if changed:
            raise ValueError("resume: the run was started with other settings: " + "; ".join(changed))
