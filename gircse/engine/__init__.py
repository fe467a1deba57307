"""The generation engine: packed prefill, one static decode step (a CUDA graph on a GPU), a scheduler over both.

`GIRCSE.encode` runs on it; `Engine.states` takes token ids.

    config.py          `EngineConfig`, and the limits that follow from the free memory
    free_memory.py     the free memory of a GPU, of the machine and of the process's container
    schedule.py        which rows make a decode batch, and which of them are prefilled together
    pool.py            the pool of keys and values
    prefill.py         packed texts and their attention; `varlen.py` has it in one kernel
    prefill_graphs.py  prefills of few tokens, captured
    decode.py          one token of every row and its attention
    body/              the decoder that runs: the model's own, or ours of few kernels
    watch.py           whether the model has changed since its decoder was read
    state.py           what a decode step reads and writes
    step.py            the decode step; its capture and replay, and those of a Jacobi pass
    jacobi.py          Jacobi decoding: a pass of many tokens of every row, and when it is faster
    running_rows.py    the rows of a batch that have not settled
    step_cost.py       the kernels and bytes of a step
    engine.py          `Engine`: prefix, prefill, steps, early stopping, out-of-memory

Imports `gircse.lm`, `gircse.ops`, `gircse.integers`, and `gircse_kernels` for the kernels of its decoder.
"""

from gircse.engine.config import EngineConfig
from gircse.engine.engine import Engine, EngineReport
from gircse.engine.jacobi import Jacobi

__all__ = ["Engine", "EngineConfig", "EngineReport", "Jacobi"]
