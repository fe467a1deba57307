"""The generation engine: packed prefill, one static decode step (a CUDA graph on a GPU), a scheduler over both.

`GIRCSE.encode` runs on it; `Engine.states` takes token ids.

    config.py        `EngineConfig`, and the limits that follow from the free memory
    free_memory.py   the free memory of a GPU, of the machine and of the process's container
    pool.py          the pool of keys and values
    prefill.py       packed texts and their attention
    decode.py        one token of every row and its attention
    schedule.py      which rows make a decode batch, and which of them are prefilled together
    fused.py         Liger-Kernel's norms, rotary embedding and MLPs in place of the model's
    step.py          the decode step and its state; its capture and replay
    engine.py        `Engine`: prefix, prefill, steps, early stopping, out-of-memory

Imports `gircse.lm`, `gircse.ops`, `gircse.integers`, and `gircse_kernels` for its attention kernel.
"""

from gircse.engine.config import EngineConfig
from gircse.engine.engine import Engine, EngineReport

__all__ = ["Engine", "EngineConfig", "EngineReport"]
