"""The kernels as a repository of the Kernel Hub, loaded from a local folder by Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def has_kernels() -> bool:
    """The distribution, not our folder of that name."""
    try:
        return bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tomllib")
    folder = tmp_path_factory.mktemp("hub") / "gircse-kernels"
    command = [sys.executable, str(ROOT / "kernels" / "tools" / "hub_layout.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


def test_layout(repository: Path) -> None:
    package = ROOT / "kernels" / "gircse_kernels"
    sources = {path.relative_to(package) for path in package.rglob("*.py")} | {Path("configs.json"), Path("py.typed")}
    for folder in ("torch-ext/gircse_kernels", "build/torch-cpu", "build/torch-cuda"):
        found = {path.relative_to(repository / folder) for path in (repository / folder).rglob("*") if path.is_file()}
        assert found - {Path("metadata.json")} == sources
    metadata = [json.loads((repository / f"build/torch-{b}/metadata.json").read_text()) for b in ("cpu", "cuda")]
    assert [entry["backend"]["type"] for entry in metadata] == ["cpu", "cuda"]
    assert len({entry["id"] for entry in metadata}) == 2
    assert all(entry["id"].isidentifier() for entry in metadata)


def test_all_imports_are_relative(repository: Path) -> None:
    for file in (repository / "build" / "torch-cuda").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) gircse", file.read_text(), re.MULTILINE), file.name


@pytest.mark.skipif(not has_kernels(), reason="needs Hugging Face's kernels: pip install kernels")
def test_loaded_by_kernels_and_its_own_tests_pass(repository: Path) -> None:
    """In a process where nothing of the checkout can be imported."""
    script = (
        "import sys, torch; from pathlib import Path; from kernels import get_local_kernel, get_loaded_kernels;"
        f"module = get_local_kernel(Path({str(repository)!r}));"
        "assert module.soft_embed.INTERPRETED;"
        "assert module.soft_embed.forward.__module__ == module.__name__ + '.soft_embed.launch_forward';"
        "assert 'gircse' not in sys.modules and 'gircse_kernels' not in sys.modules;"
        "print(get_loaded_kernels()[0].metadata.name)"
    )
    elsewhere = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "gircse" not in path]
    elsewhere = [path for path in elsewhere if path and not (Path(path) / "gircse_kernels").exists()]
    elsewhere = [path for path in elsewhere if not (Path(path) / "gircse").exists()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(elsewhere), "TRITON_INTERPRET": "1"}
    run = {"cwd": repository, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", script], **run)  # type: ignore[call-overload]
    assert done.stdout.strip() == "gircse-kernels", done.stderr[-3000:]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout


@pytest.mark.skipif(not has_kernels(), reason="needs Hugging Face's kernels: pip install kernels")
def test_build_file(repository: Path) -> None:
    from kernels._rust import Build  # type: ignore[import-not-found, unused-ignore]

    backends = Build.open(str(repository)).general.backends
    assert [str(backend) for backend in backends] == ["cpu", "cuda"]
