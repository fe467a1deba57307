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
| `numerics.py` | scores, Gumbel noise, safe maxima: device functions that all share |
| `traffic.py` | bytes and FLOPs of every launch |

`TRITON_INTERPRET=1`, set before this is imported, runs everything on CPU tensors.
"""
