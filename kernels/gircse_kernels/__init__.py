"""Triton kernels of gircse: device code, launchers and their config table. Depends on torch and triton only.

| file | what |
|---|---|
| `soft_embed.py` | what is offered: `forward`, `backward`, `chunk_scores` |
| `contract.py` | what goes in and comes out, shared with the torch backend |
| `plan.py`, `configs.json` | which form, tiles and shares for which problem and device |
| `launching.py` | the two places where a GPU gets work: `launch` a kernel, `product` by cuBLAS |
| `launch_forward.py`, `launch_many_rows.py`, `launch_backward.py` | the launchers |
| `one_row.py`, `few_rows.py`, `merge.py` | forms 1 and 2, which read a tied matrix once; partial sums -> result |
| `many_rows.py` | form 3: two products for each chunk of the vocabulary |
| `backward.py` | gradients, scores recomputed or P kept |
| `scores.py` | from dot products to scores, Gumbel noise, safe maxima: device functions that all forms share |
| `matmul.py` | tiled products in 3xTF32 |
| `info_nce.py`, `similarity.py`, `pool.py` | the contrastive loss |
| `decode_attention.py` | attention of one token per row on a static buffer of keys and values |

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
