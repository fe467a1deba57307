"""An output folder remembers the settings that it was begun with; another start must have the same.

They lie in `FOLDER/.gircse/job.json`. The folder of that name begins with a dot, because readers of Parquet would take
other files beside the data for data.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from gircse.corpora.objects import new_object, place, remove, visible

STATE = ".gircse"


def begin(folder: str, settings: dict[str, Any]) -> bool:
    """Compares the settings with those the folder was begun with, or writes them into a new one.

    Returns:
        Whether the folder was begun before.

    Raises:
        ValueError: other settings, which are named; a manifest that cannot be read; files that are not of such a run.
    """
    folder = folder.rstrip("/")
    manifest = f"{folder}/{STATE}/job.json"
    system, path = place(manifest)
    wanted = json.loads(json.dumps(settings))
    if not system.isfile(path):
        if system.isfile(place(folder)[1]):
            raise ValueError(f"output: {folder} is a file, expected a folder")
        if visible(folder):
            raise ValueError(f"output: {folder} has files but no {STATE}/job.json, expected a new or empty folder")
        with new_object(manifest) as file:
            file.write(json.dumps(wanted, indent=2).encode())
        return False
    try:
        begun = json.loads(system.cat_file(path))
        names = begun.keys() | wanted.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"output: {manifest} cannot be read: {type(error).__name__}: {error}") from None
    different = [
        f"{name}: {folder} was begun with {begun.get(name)!r}, got {wanted.get(name)!r}"
        for name in sorted(names)
        if begun.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError("; ".join(different) + "; expected the same to go on (or another folder to begin anew)")
    return True


def forget_if_empty(folder: str) -> None:
    """Removes the manifest of a folder that nothing was written into."""
    if not visible(folder):
        with suppress(FileNotFoundError):
            remove(f"{folder}/{STATE}")
