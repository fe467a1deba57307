"""Where a number comes from: machine, versions, date, commit, and the hash of the sources that it depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.sources import MEASURED_BY, ROOT, dependencies, sources_hash

_STARTED = time.time()
_PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def provenance(device: str | torch.device, benchmark: str) -> dict[str, Any]:
    """A JSON object for a record of this kind; what is not there (no GPU, no git) is None."""
    device = torch.device(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "sources": measured_sources(benchmark),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def measured_sources(benchmark: str) -> str | None:
    """`sources_hash`; None where a file was edited since this process began, and may not be the version measured."""
    edited = any(path.stat().st_mtime > _STARTED for path in dependencies(MEASURED_BY[benchmark]).values())
    return None if edited else sources_hash(benchmark)


def checkout_environment(**changes: str) -> dict[str, str]:
    """This process' environment, for another one that is to import this checkout, whatever is installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def device_name(device: str | torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or the processor's name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor as Linux names it, with the number of its cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        name = next(names, name)
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it."""
    head = _run("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _run("git", "-C", str(ROOT), "status", "--porcelain") else "")


def _driver() -> str | None:
    found = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
