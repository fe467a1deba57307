"""Every knob of a training run, its default and its meaning, in one dataclass; the command line is made from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gircse.config import GircseConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What may differ between a run and its continuation: where it writes, how often, and how it looks.
_FREE_ON_RESUME = frozenset({"output", "resume", "save_every", "keep_checkpoints", "eval_every", "progress", "device"})


def _knob(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `gircse.train.train`. Defaults are the paper's (SPEC 1.6) where it gives one."""

    model: str = _knob("", "base model: folder or hub name")
    data: tuple[str, ...] = _knob((), "training rows: JSONL files or saved `datasets` folders")
    output: str = _knob("runs/train", "folder of the run")
    num_steps: int = _knob(5, "K, soft tokens per text; 0 trains the encoder-only baseline")
    stepwise: bool = _knob(True, "contrastive loss on every step; without it on the last embedding only")
    reg_weight: float = _knob(1.0, "lambda, weight of the penalty on steps that get worse")
    reduction: str = _knob("mean", "losses over steps: 'mean' (the reference code) or 'sum' (the paper's formula)")
    contrastive_temperature: float = _knob(0.02, "tau of the contrastive loss")
    pooling: str = _knob("mean", "steps to embedding: mean, last or weighted")
    temperature: float = _knob(1.0, "logit temperature T of the soft tokens")
    append_eos: bool = _knob(False, "append the end-of-sequence token to every prompt")
    include_prompt_state: bool = _knob(False, "pool the prompt's last state as the first of the K")
    batch_size: int = _knob(32, "rows per step; all positives and negatives of a batch are candidates")
    max_steps: int | None = _knob(None, "optimizer steps; default: one pass over the data")
    query_max_length: int = _knob(256, "tokens of a query")
    passage_max_length: int = _knob(2048, "tokens of a positive or negative")
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
    resume: bool = _knob(False, "go on from the newest checkpoint of `output`")
    progress: bool = _knob(True, "show a progress bar")

    def __post_init__(self) -> None:
        self.gircse_config()  # checks num_steps, pooling, temperature and the like
        for name in (
            "batch_size",
            "query_max_length",
            "passage_max_length",
            "lora_r",
            "lora_alpha",
            "keep_checkpoints",
        ):
            self._expect(name, self._is_int(name) and getattr(self, name) >= 1, "an integer >= 1")
        for name in ("max_steps", "eval_every"):
            value = getattr(self, name)
            self._expect(name, value is None or (self._is_int(name) and value >= 1), "an integer >= 1")
        self._expect("save_every", self._is_int("save_every") and self.save_every >= 1, "an integer >= 1")
        self._expect(
            "max_negatives",
            self.max_negatives is None or (self._is_int("max_negatives") and self.max_negatives >= 0),
            "an integer >= 0",
        )
        for name in ("contrastive_temperature", "learning_rate", "max_grad_norm"):
            self._expect(name, 0 < getattr(self, name) < float("inf"), "a number > 0")
        for name in ("weight_decay", "reg_weight"):
            self._expect(name, 0 <= getattr(self, name) < float("inf"), "a number >= 0")
        for name in ("warmup_ratio", "lora_dropout"):
            self._expect(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._expect("reduction", self.reduction in ("mean", "sum"), "'mean' or 'sum'")

    def gircse_config(self) -> GircseConfig:
        """The part that belongs to the model and is saved with it."""
        from gircse.config import GircseConfig  # here, because it imports torch and the command line's --help does not

        return GircseConfig(
            num_steps=self.num_steps,
            pooling=self.pooling,
            temperature=self.temperature,
            append_eos=self.append_eos,
            include_prompt_state=self.include_prompt_state,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        values = json.loads(path.read_text(encoding="utf-8"))
        tuples = {name: tuple(values[name]) for name in ("data", "lora_targets")}
        return cls(**{**values, **tuples})

    def check_continues(self, earlier: TrainConfig) -> None:
        """Raises ValueError naming the settings in which a resumed run differs from the run it continues."""
        changed = [
            f"{f.name}: was {getattr(earlier, f.name)!r}, is {getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name not in _FREE_ON_RESUME and getattr(earlier, f.name) != getattr(self, f.name)
        ]
        if changed:
            raise ValueError("resume: the run was started with other settings: " + "; ".join(changed))

    def _is_int(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool)

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")
