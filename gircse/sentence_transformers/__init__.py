"""GIRCSE as a sentence-transformers (6.x) model: the module, its losses, loading.

modeling_gircse.py   the module in plain PyTorch; saved beside the weights, runs without this package
module.py            `GIRCSEModule`: the same module on our engine (encoding) and rollout (training)
losses.py            `GIRCSELoss`, `CachedGIRCSELoss` for `SentenceTransformerTrainer`
loading.py           `load`, which is `gircse.load`
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_INSTALL = "pip install 'sentence-transformers>=6'"
try:
    _found = version("sentence-transformers")
except PackageNotFoundError:
    raise ModuleNotFoundError(
        f"gircse.load and gircse.sentence_transformers need sentence-transformers: {_INSTALL}",
        name="sentence_transformers",
    ) from None
if int(_found.split(".")[0]) < 6:
    raise ImportError(f"gircse.sentence_transformers needs sentence-transformers 6 or newer, got {_found}: {_INSTALL}")

from gircse.sentence_transformers.loading import load  # noqa: E402
from gircse.sentence_transformers.losses import CachedGIRCSELoss, GIRCSELoss  # noqa: E402
from gircse.sentence_transformers.module import GIRCSEModule  # noqa: E402

__all__ = ["CachedGIRCSELoss", "GIRCSELoss", "GIRCSEModule", "load"]
