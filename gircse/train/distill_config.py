"""Every setting of a distillation, its default and its meaning; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gircse.train.run_config import RunConfig
from gircse.train.settings import setting


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Settings of `gircse.train.distill.distill`."""

    command: ClassVar[str] = "distill"
    free_on_resume: ClassVar[frozenset[str]] = RunConfig.free_on_resume | {"teacher"}
    # Batches are drawn from the rows of all files together (`gircse.train.batches.TrainingData`).
    batching: ClassVar[str] = "mixed"
    weights: ClassVar[tuple[float, ...]] = ()

    teacher: str = setting("", "GIRCSE folder or hub name of the teacher")
    instruction: str | None = setting(
        None,
        'stands in for rows without "prompt", those of the evaluation too, "" for none; default: they are an error',
    )
    output: str = setting("runs/distill", "folder of the run")
    init: str = setting("fresh", "LoRA of the student: 'fresh', or go on from the 'teacher's own")
    num_steps: int | None = setting(None, "K of the teacher's embeddings; default: the teacher's own")
    temperature: float = setting(0.02, "tau of the softmax over a batch's documents")
    kl_weight: float = setting(1.0, "weight of the KL divergence beside the cosine distance")
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW")
    lora_dropout: float = setting(0.0, "LoRA dropout")
    eval_data: str | None = setting(None, "rows to evaluate teacher and student on, in one table")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("init", self.init in ("fresh", "teacher"), "'fresh' or 'teacher'")
        if self.init == "teacher":
            self.expect_no_lora_settings("init = 'teacher', whose LoRA has its own")
        self.expect_integers("num_steps")
        self.expect_positive("temperature")
        self.expect_not_negative("kl_weight")

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instruction of each of `data` for rows without "prompt"; empty: such rows are an error."""
        return () if self.instruction is None else (self.instruction,) * len(self.data)
