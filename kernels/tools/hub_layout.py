"""Write the package `gircse_kernels` as a repository of Hugging Face's Kernel Hub.

    python kernels/tools/hub_layout.py FOLDER

writes, from a checkout::

    build.toml, torch-ext/gircse_kernels/, tests/     what `kernel-builder` builds from
    build/torch-cpu/, build/torch-cuda/               what `kernels.get_kernel` and `get_local_kernel` load

The kernels are Python and Triton alone, so a build is a copy beside a `metadata.json`, the same for every version of
Python, PyTorch and CUDA ("noarch", once called universal). All imports of the package are relative, because the hub
loads a kernel under a name that it chooses, several versions side by side. Needs Python 3.11 or newer, whose TOML
reader it uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[1]
PACKAGE = KERNELS / "gircse_kernels"
SHIPPED = ("*.py", "*.json", "py.typed")


def write(folder: Path) -> list[Path]:
    """The repository in `folder`, which is new or empty. Returns the build variants.

    Raises:
        FileExistsError: the folder is not empty. FileNotFoundError: there is no build.toml, so this is no checkout.
    """
    config = KERNELS / "build.toml"
    general = _general(config)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: got {folder}, which is not empty, expected a new one")
    name = general["name"].replace("-", "_")
    files = sorted(path for pattern in SHIPPED for path in PACKAGE.rglob(pattern))
    _copy(files, PACKAGE, folder / "torch-ext" / name)
    for path in (config, KERNELS / "README.md"):
        shutil.copy2(path, folder / path.name)
    _copy(sorted((KERNELS / "tests").glob("*.py")), KERNELS, folder)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    variants = []
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        _copy(files, PACKAGE, variant)
        metadata = {
            "name": general["name"],
            "id": f"_{name}_{backend}_{digest}",  # of this content, under which it is imported
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def _general(config: Path) -> dict[str, Any]:
    import tomllib

    if not config.is_file():
        raise FileNotFoundError(f"{config}: not found, expected a checkout of the repository")
    return tomllib.loads(config.read_text(encoding="utf-8"))["general"]


def _copy(files: list[Path], root: Path, folder: Path) -> None:
    for path in files:
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    for variant in write(parser.parse_args().folder):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
