"""The digest of files of any size, in bounded memory."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of the file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_folder(folder: Path, suffixes: tuple[str, ...]) -> str:
    """The SHA-256 of the names and contents of the files in the folder itself that end in one of these."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in suffixes and path.is_file():
            digest.update(f"{path.name}\0{sha256_of_file(path)}\0".encode())
    return digest.hexdigest()
