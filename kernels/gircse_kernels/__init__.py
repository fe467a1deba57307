"""Triton kernels of gircse: device code, launchers and their config table. Depends on torch and triton only.

| file | what |
|---|---|
| `soft_embed.py` | what is offered: `forward`, `backward`, `chunk_scores` |
| `launching.py`, `launch_forward.py`, `launch_backward.py` | the launchers |
| `plan.py`, `configs.json` | which kernels, tiles and shares for which problem and device |
| `one_pass.py` | few rows, tied, D <= 2048: the matrix is read once |
| `two_pass.py` | everything else: scores of a chunk, weighted sum of a chunk |
| `merge.py` | partial softmax sums -> result and statistics |
| `backward.py` | gradients, scores recomputed |
| `decode_attention.py` | attention of one token per row on a static buffer of keys and values |
| `scores.py` | from dot products to scores, Gumbel noise, safe maxima: device functions that all share |
| `matmul.py` | tiled products |
| `contract.py` | what goes in and comes out, shared with the torch backend |

`TRITON_INTERPRET=1`, set before this is imported, runs everything on CPU tensors.

Importing this imports no Triton: the modules with the ops, `gircse_kernels.soft_embed` and its like, come on first use.
"""

import importlib
from types import ModuleType

OPS = ("decode_attention", "info_nce", "soft_embed")


def __getattr__(name: str) -> ModuleType:
    """A module with an op, also where this package was loaded under another name."""
    if name in OPS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
