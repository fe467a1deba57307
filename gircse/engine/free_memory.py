"""How much memory is free: on a GPU, on the machine, and in the container that the process runs in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_UNKNOWN = 4 << 30  # assumed where the system reports nothing

# The files of a group's limits and of its usage; the prefix in memory.stat of the counts that include its children.
_VERSION_1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_VERSION_2 = (("memory.max", "memory.high"), "memory.current", "")
# Cached pages of files count as used, but the kernel drops them when a process asks for memory.
_RECLAIMABLE = ("inactive_file", "active_file")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can allocate now: on a GPU the free memory and what PyTorch's allocator holds unused, but
    for the memory of CUDA graphs; elsewhere the machine's available memory, or less where the container (a control
    group) has less left."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        segments = [one for one in torch.cuda.memory_snapshot() if one["device"] == index]
        unused = (one["total_size"] - one["allocated_size"] for one in segments if one["segment_pool_id"] == (0, 0))
        return torch.cuda.mem_get_info(device)[0] + sum(unused)
    return max(0, min([_machine_bytes(), *container_bytes()]))


def _machine_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not Linux: the whole memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _UNKNOWN


def container_bytes(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that each control group of the process has left below its limit, for version 1 and 2, from the process's
    own group up to the outermost visible one. A group without a limit gives no entry, or in version 1 a number beyond
    every machine.

    Args:
        groups: the kernel's list of the process's groups, lines of `number:controllers:path`.
        mounted: the folder in which the groups are mounted.
    """
    left: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version: tuple[tuple[str, ...], str, str]
            if controllers == "":
                root, version = mounted, _VERSION_2
            elif "memory" in controllers.split(","):
                root, version = mounted / "memory", _VERSION_1
            else:
                continue
            # A container often sees its own group as the root, although the kernel names a path from the host's root.
            group = root / path.lstrip("/") if ".." not in path else root
            for folder in (group, *group.parents):
                left += _left(folder, *version)
                if folder == root:
                    break
    return left


def _left(folder: Path, limits: tuple[str, ...], usage: str, prefix: str) -> list[int]:
    """What one group has left below each of its limits."""
    left = []
    for name in limits:
        with contextlib.suppress(OSError, ValueError):  # the group is not visible, or its limit is "max"
            limit = int((folder / name).read_text())
            used = int((folder / usage).read_text())
            left.append(limit - used + _reclaimable(folder, prefix))
    return left


def _reclaimable(folder: Path, prefix: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(lines.get(prefix + name, 0)) for name in _RECLAIMABLE)
    return 0
