"""How much memory can still be had: on a GPU, on the machine, and in the container that the process runs in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_UNKNOWN = 4 << 30  # where the system says nothing at all

# The files of a group's limits and of its usage; the prefix in memory.stat of what counts its children too.
_VERSION_1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_VERSION_2 = (("memory.max", "memory.high"), "memory.current", "")
# Pages of files: they count as used, and the kernel drops them when a process asks for memory.
_RECLAIMABLE = ("inactive_file", "active_file")


def free_bytes(device: torch.device) -> int:
    """What a process can take now: on a GPU what is free there and what PyTorch's allocator keeps unused; elsewhere
    what the machine has available, or less where a container (a control group) has less left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([_machine_bytes(), *container_bytes()]))


def _machine_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _UNKNOWN


def container_bytes(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group that the process belongs to has left below its limit, of version 1 and 2, from the
    process's own group up to the outermost one that can be seen. A group without a limit gives nothing, or in version 1
    a number beyond every machine.

    Args:
        groups: the kernel's list of the process's groups, lines of `number:controllers:path`.
        mounted: where the groups can be looked at.
    """
    found: list[int] = []
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
            # a container often sees its own group as the root, whatever path the kernel names
            group = root / path.lstrip("/") if ".." not in path else root
            for folder in (group, *group.parents):
                found += _left(folder, *version)
                if folder == root:
                    break
    return found


def _left(folder: Path, limits: tuple[str, ...], usage: str, prefix: str) -> list[int]:
    """Below each limit of one group that has one."""
    found = []
    for name in limits:
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max": no limit
            limit = int((folder / name).read_text())
            used = int((folder / usage).read_text())
            found.append(limit - used + _reclaimable(folder, prefix))
    return found


def _reclaimable(folder: Path, prefix: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(lines.get(prefix + name, 0)) for name in _RECLAIMABLE)
    return 0
