"""Training: `train` runs the loop; `python -m gircse.train` is the same behind a command line.

The functions are imported on first use, so that `--help` needs no torch.
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
