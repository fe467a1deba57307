"""Evaluation beyond one retrieval task: mteb's benchmarks at many numbers of steps, offline tasks, instructions.

`instruction_following` and everything that needs mteb or scikit-learn import them when they are imported themselves;
where the extra is missing, the error says how to install it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

INSTALL = "pip install 'gircse[eval]'"
STEPS = (1, 5, 10, 20)  # numbers of steps that are compared unless others are asked for


def require(module: str) -> ModuleType:
    """Imports a module of the extra `eval`.

    Raises:
        ModuleNotFoundError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        why = "" if sys.version_info >= (3, 11) else " (mteb needs Python 3.11 or newer)"
        raise ModuleNotFoundError(
            f"this evaluation needs {error.name or module}, which is not installed: {INSTALL}{why}", name=error.name
        ) from None
