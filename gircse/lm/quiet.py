"""Warnings of other libraries about each other, which nobody who uses this one can do anything about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_peft() -> Iterator[None]:
    """For calls that put PEFT around a model: PEFT asks it for `is_gradient_checkpointing`, a name that transformers
    has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
