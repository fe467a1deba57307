"""Triton kernels of gircse: device code, launchers and their config table. Depends on torch and triton only.

The mathematics, the three forms of `soft_embed` and the map of the files stand in the README of the folder above.

`TRITON_INTERPRET=1`, set before this is imported, runs everything on CPU tensors.

Importing this imports no Triton: the modules with the ops, `gircse_kernels.soft_embed` and its like, come on first use.
"""

import importlib
from types import ModuleType

OPS = ("decoder", "info_nce", "soft_embed")


def __getattr__(name: str) -> ModuleType:
    """A module with an op, also where this package was loaded under another name."""
    if name in OPS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
