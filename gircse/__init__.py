"""Generative text embeddings, fast: soft tokens without a [tokens, vocabulary] tensor, a cached differentiable rollout.

    import gircse
    model = gircse.GIRCSE.from_pretrained("path-or-name")
    embeddings = model.encode(["a text", "another"], num_steps=5)      # float32 [2, D]

`gircse.ops` stands by itself: it needs torch only, and imports neither transformers nor peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gircse._version import __version__

if TYPE_CHECKING:
    from gircse.engine import Engine, EngineConfig
    from gircse.lm.causal_lm import UnsupportedModelError
    from gircse.lm.config import GircseConfig
    from gircse.model import GIRCSE
    from gircse.sentence_transformers.loading import load

__all__ = ["GIRCSE", "Engine", "EngineConfig", "GircseConfig", "UnsupportedModelError", "__version__", "load", "ops"]

_HOMES = {
    "Engine": "gircse.engine",
    "EngineConfig": "gircse.engine",
    "GIRCSE": "gircse.model",
    "GircseConfig": "gircse.lm.config",
    "UnsupportedModelError": "gircse.lm.causal_lm",
    "load": "gircse.sentence_transformers",
}


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; whoever only wants the ops does not pay for it
    import importlib

    if name == "ops":
        return importlib.import_module("gircse.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gircse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
