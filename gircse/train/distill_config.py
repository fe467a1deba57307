"""Every knob of a distillation, its default and its meaning; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass

from gircse.train.settings import Knobs
from gircse.train.settings import knob as _knob

INITS = ("fresh", "teacher")


@dataclass(frozen=True)
class DistillConfig(Knobs):
    """Settings of `gircse.train.distill.distill`."""

    teacher: str = _knob("", "GIRCSE folder or hub name of the teacher")
    data: tuple[str, ...] = _knob((), "training rows: JSONL files or saved `datasets` folders")
    instruction: str | None = _knob(
        None,
        'stands in for rows without "prompt", those of the evaluation too, "" for none; default: they are an error',
    )
    output: str = _knob("runs/distill", "folder of the run")
    init: str = _knob("fresh", "LoRA of the student: 'fresh', or go on from the 'teacher's own")
    num_steps: int | None = _knob(None, "K of the teacher's embeddings; default: the teacher's own")
    temperature: float = _knob(0.02, "tau of the softmax over a batch's documents")
    kl_weight: float = _knob(1.0, "weight of the KL divergence beside the cosine distance")
    batch_size: int = _knob(32, "rows per step; all positives and negatives of a batch are candidates")
    max_steps: int | None = _knob(None, "optimizer steps; default: one pass over the data")
    query_max_length: int = _knob(256, "tokens of a query")
    passage_max_length: int = _knob(2048, "tokens of a positive or negative")
    max_negatives: int | None = _knob(None, "hard negatives used per row; default: all it has")
    learning_rate: float = _knob(1e-4, "peak learning rate of AdamW")
    weight_decay: float = _knob(0.0, "weight decay of AdamW")
    warmup_ratio: float = _knob(0.03, "share of the steps that warm up; then linear decay to zero")
    max_grad_norm: float = _knob(1.0, "gradient clipping")
    lora_r: int = _knob(16, "LoRA rank of a fresh student")
    lora_alpha: int = _knob(64, "LoRA alpha of a fresh student")
    lora_dropout: float = _knob(0.0, "LoRA dropout of a fresh student")
    gradient_checkpointing: bool = _knob(False, "recompute the prompt pass in backward: less memory, more time")
    dtype: str = _knob("auto", "dtype of the frozen base weights; the adapter trains in float32")
    device: str | None = _knob(None, "device; default: CUDA if there is one")
    seed: int = _knob(0, "seed of the data order, the LoRA initialisation and the dropout")
    progress: bool = _knob(True, "show a progress bar")

    def __post_init__(self) -> None:
        self.check_types()
        self.expect("init", self.init in INITS, " or ".join(map(repr, INITS)))
        self.expect_counts("batch_size", "query_max_length", "passage_max_length", "lora_r", "lora_alpha")
        self.expect_counts("num_steps", "max_steps")
        self.expect("max_negatives", self.max_negatives is None or self.max_negatives >= 0, "an integer >= 0")
        self.expect_positive("temperature", "learning_rate", "max_grad_norm")
        self.expect_not_negative("kl_weight", "weight_decay")
        self.expect_shares("warmup_ratio", "lora_dropout")
