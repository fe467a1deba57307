"""The generation engine: packed prefill, one static decode step (a CUDA graph on a GPU), a scheduler over both.

`GIRCSE.encode` runs on it; `Engine.states` is the way in for token ids. Where what lives:

    config.py     `EngineConfig`, and the limits that follow from the free memory
    kv.py         the pool of keys and values; the attention of prefill and decoding
    plan.py       which rows make a decode batch, which of them are prefilled together
    fused.py      Liger-Kernel's norms, rotary embedding and MLPs in place of the model's
    step.py       the decode step and its state; its capture and replay
    engine.py     `Engine`: prefix, prefill, steps, early stopping, out-of-memory
"""

from gircse.engine.config import EngineConfig
from gircse.engine.engine import Engine, EngineReport

__all__ = ["Engine", "EngineConfig", "EngineReport"]
