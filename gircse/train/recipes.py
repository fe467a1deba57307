"""Recipes: TOML files that set fields of `TrainConfig`. What a recipe leaves out keeps its default."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from gircse.train.config import TrainConfig, check_keys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of `TrainConfig` that a recipe sets, checked.

    Paths in a recipe are relative to the current folder, as on the command line.

    Raises:
        OSError: there is no such file.
        ValueError: no TOML, an unknown key, a value of the wrong type or out of range; names file, key, value and what
            was expected.
    """
    try:
        values = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
        check_keys(values)
        TrainConfig(**values)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: byte {error.start + 1}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: invalid TOML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return values
