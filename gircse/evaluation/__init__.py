"""Quality of a model at many numbers of steps, on the user's rows, on mteb's benchmarks and on tasks without a network.

| file | what is in it |
|---|---|
| `metrics.py` | nDCG, MRR, recall and success of a ranking |
| `retrieval.py` | the metrics of a `RetrievalTask` at each number of steps |
| `run.py` | mteb's tasks at several numbers of steps, continued where an earlier run stopped |
| `encoder.py` | the model as mteb's encoder |
| `fingerprint.py` | a name for the weights, by which mteb's cache tells models apart |
| `instructions.py` | the instruction of each task of MTEB(eng, v2) |
| `clustering.py` | k-means and the V-measure |
| `step_store.py` | embeddings after several numbers of steps, on disk |
| `offline_tasks.py`, `stdlib_text.py` | tasks that need no download, and their text |
| `instruction_following.py` | whether an embedding follows its instruction |
| `results.py` | scores as a table, a JSON file and a plot |

Imports `model`, `data`, `lm`, `ops`, `files` and `show`. Modules that need mteb call `require`, so that all others
work without the extra `eval`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

INSTALL = "pip install 'gircse[eval]'"
STEPS = (1, 2, 3, 5, 7, 10, 15, 20)  # the default numbers of steps
MAX_LENGTH = 512  # tokens of a prompt of an mteb task, by default


def require(module: str) -> ModuleType:
    """Imports a module of the extra `eval`.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        why = "" if sys.version_info >= (3, 11) else " (mteb needs Python 3.11 or newer)"
        raise ModuleNotFoundError(
            f"this evaluation needs {error.name or module}, which is not installed: {INSTALL}{why}", name=error.name
        ) from None
