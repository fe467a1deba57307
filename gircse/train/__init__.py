"""Training and distillation; `python -m gircse.train` is the command `gircse train`.

| file | |
|---|---|
| `loop` | `train`, and the loop that training and distillation share |
| `step`, `grad_cache` | the training step; batches that are larger than the memory |
| `capture/` | micro-batches as CUDA graphs |
| `distill`, `distill_loss` | the student of a teacher: its targets, its step, its objective |
| `settings`, `run_config` | how settings are checked; those that both kinds of run have |
| `config`, `distill_config`, `recipes` | the settings of each kind of run; files that set them |
| `batches`, `learning_rate` | of each step the rows, with their false negatives; the learning rate and its warm-up |
| `lora`, `fsdp` | the trainable model; its layers shared by several processes |
| `ranks`, `signals` | the processes of a job; SIGTERM and SIGINT |
| `micro_batch_size` | how many tokens fit the memory |
| `run_folder`, `checkpoint`, `log`, `step_monitor` | what a run leaves: what it started from, its state, its numbers |
| `plan/` | memory and least time of a step, without weights |

It imports `data`, `evaluation`, `model` and what is below them. The functions are imported on first use, so that
`--help` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gircse.train.loop import TrainResult, train

__all__ = ["TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gircse.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'gircse.train' has no attribute {name!r}")
