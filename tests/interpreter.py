"""Triton's interpreter without the work that it repeats.

It replaces the functions of `triton.language` by its own before a kernel runs, and does so anew at every call of a
device function, `tl.sum` and the like included, although the kernel's launch ends long after. That took two fifths of
the time of the kernels' tests. Here the functions that one module sees are replaced once in a launch.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from triton.runtime import interpreter


def replace_once_a_launch() -> None:
    """Does nothing where another Triton names these two parts differently: its tests are only slower."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    replace, replaced = interpreter._patch_lang, set[int]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:  # the end of a launch; what a device function replaced, the interpreter leaves
            super().restore()
            replaced.clear()

    def once(function: FunctionType) -> Any:
        if id(function.__globals__) not in replaced:
            replaced.add(id(function.__globals__))
            return replace(function)
        return None

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, once
