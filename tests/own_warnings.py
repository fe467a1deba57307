"""Deprecations that other libraries report because of a call of ours, found out by the stack: nobody who uses the
package should see one.

A filter cannot tell them from what a test causes itself (PEFT warns whoever wraps a model), nor from what one library
says of another. Other warnings are no fault by themselves: PEFT's of missing weights comes before our error does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gircse

_PACKAGE = Path(gircse.__file__).parent
_PROJECT = _PACKAGE.parent
_DEPRECATIONS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
_LIBRARIES = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "mteb",
    "peft",
    "sentence_transformers",
    "torch",
    "transformers",
)


@contextmanager
def caused_by_us() -> Iterator[list[str]]:
    """Yields the list of such warnings, one line each, which grows while the block lasts. A filter of ours that ignores
    one counts."""
    found: list[str] = []
    warn = warnings.warn

    def watched(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **kwargs: Any) -> None:
        kind = category or (type(message) if isinstance(message, Warning) else UserWarning)
        caller = _caller(sys._getframe(1)) if issubclass(kind, _DEPRECATIONS) else None
        if caller is not None:
            with warnings.catch_warnings(record=True) as shown:
                warn(message, category, stacklevel + 1, source, **kwargs)
            found.extend(f"{caller}: {each.category.__name__}: {each.message}" for each in shown)
        warn(message, category, stacklevel + 1, source, **kwargs)

    warnings.warn = watched  # type: ignore[assignment]
    try:
        yield found
    finally:
        warnings.warn = warn


def _caller(frame: FrameType | None) -> str | None:
    """file:line of the package that called the library which warns; None where something else did, a test for one."""
    if frame is None or frame.f_globals.get("__name__", "").split(".")[0] not in _LIBRARIES:
        return None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PROJECT) and "site-packages" not in path.parts:
            return f"{path.name}:{frame.f_lineno}" if path.is_relative_to(_PACKAGE) else None
        frame = frame.f_back
    return None
