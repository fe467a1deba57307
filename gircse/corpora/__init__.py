"""Corpora: tables of texts in, the same tables with embeddings out, on one machine or many (docs/scale.md).

| file | what is in it |
|---|---|
| `job.py` | `EncodeJob`: which columns are encoded, by which model, how |
| `columns.py` | Arrow columns of texts to strings, embeddings to Arrow columns |
| `text_encoder.py` | `TextEncoder`: a table to a table, for any framework that calls a function on tables |
| `sources.py` | Parquet, JSON Lines and text, local or by URL, read in windows |
| `objects.py` | files, local or by URL, that appear whole or not at all |
| `manifest.py` | the settings that an output folder was begun with |
| `encode_files.py` | files to files in this process; started again it goes on |
| `ray_data.py` | `encode_dataset`: a dataset of Ray Data |
| `ray_files.py` | files to a folder on a Ray cluster; started again it goes on |

Reading and writing tables needs pyarrow (`pip install gircse[tables]`), a cluster Ray (`pip install gircse[ray]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gircse.corpora.job import EncodeJob
    from gircse.corpora.ray_data import encode_dataset
    from gircse.corpora.text_encoder import TextEncoder

__all__ = ["EncodeJob", "TextEncoder", "encode_dataset"]

_HOMES = {"EncodeJob": "job", "TextEncoder": "text_encoder", "encode_dataset": "ray_data"}


def __getattr__(name: str) -> Any:
    # `EncodeJob` alone needs neither pyarrow nor torch.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"gircse.corpora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gircse.corpora' has no attribute {name!r}")
