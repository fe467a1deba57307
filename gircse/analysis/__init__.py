"""The open checks of the paper, on a model and data of the user (`gircse analyze`).

| file | what is in it |
|---|---|
| `analyze.py` | all checks, as the contents of `analysis.json` |
| `movement.py` | how far every step moves an embedding, and where texts settle |
| `anatomy.py` | what soft tokens are made of |
| `statistics.py` | differences paired over queries, and the smallest K that is good enough |
| `table.py`, `plots.py` | the result as text and as plots |

Imports `evaluation`, `inspect`, `model`, `data`, `lm` and `show`.
"""

STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # the default numbers of steps
SAMPLE = 64  # texts whose soft tokens are examined, by default
