"""Pickles that run code when they are unpickled carelessly: they leave a file behind, and tests look for it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


class _Touch:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.touch, (self.sentinel,)


def plain_pickle(sentinel: Path) -> bytes:
    return pickle.dumps({"a": _Touch(sentinel)})


def save_torch(path: Path, sentinel: Path, **others: Any) -> None:
    """As `torch.save` writes it, a zip, with `others` beside the trap."""
    torch.save({**others, "a": _Touch(sentinel)}, path)
