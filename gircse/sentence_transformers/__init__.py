"""GIRCSE as a sentence-transformers (6.x) model: the module, its losses, loading.

    modeling_gircse.py          the module in plain PyTorch, which is saved beside the weights and runs without gircse
    modeling_gircse_encode.py   its `encode` with `return_steps`; saved with it
    modeling_gircse_folder.py   its loading, saving and model card; saved with it
    modeling_gircse_math.py     its soft token, pooling and padding; saved with it
    module.py                   `GIRCSEModule`: the same module on the engine (encoding) and the rollout (training)
    losses.py                   `GIRCSELoss`, `CachedGIRCSELoss` for `SentenceTransformerTrainer`
    callback.py                 `SoftTokenGradientCallback`: a schedule of the gradient at the soft token
    loading.py                  `load`, which is `gircse.load`

Imports `gircse.model`, `gircse.data` and what is below them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_INSTALL = "pip install 'sentence-transformers>=6'"
try:
    _version = version("sentence-transformers")
except PackageNotFoundError:
    raise ModuleNotFoundError(
        f"gircse.load and gircse.sentence_transformers need sentence-transformers: {_INSTALL}",
        name="sentence_transformers",
    ) from None
if int(_version.split(".")[0]) < 6:
    raise ImportError(f"gircse.sentence_transformers needs sentence-transformers >= 6, got {_version}: {_INSTALL}")

from gircse.sentence_transformers.callback import SoftTokenGradientCallback  # noqa: E402
from gircse.sentence_transformers.loading import load  # noqa: E402
from gircse.sentence_transformers.losses import CachedGIRCSELoss, GIRCSELoss  # noqa: E402
from gircse.sentence_transformers.module import GIRCSEModule  # noqa: E402

__all__ = ["CachedGIRCSELoss", "GIRCSELoss", "GIRCSEModule", "SoftTokenGradientCallback", "load"]
