"""Files and folders that no failure leaves half-written, and that no two processes write at once.

| file | what is in it |
|---|---|
| `atomic.py` | new files and folders that appear whole or not at all; removing a folder |
| `lock.py` | one process at a time in an output folder |
| `digest.py` | the SHA-256 of a file |

Imports nothing of gircse.
"""
