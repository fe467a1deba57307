"""Peak memory: of a call, what it allocates at most above what was there before; of this whole process."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.timing import synchronize


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Of one call that has been warmed up; its results count.

    On CUDA by the allocator's own counters. On the CPU by the allocations and releases that PyTorch's profiler sees:
    exact for tensors, blind to the scratch of libraries (`bench/soft_embed.py` measures a whole process instead).
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # otherwise the profiler's library tells stderr whenever it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept  # only now, or its release would count
    return _highest(profile)


def _highest(profile: torch.profiler.profile) -> int:
    inner: Any = profile.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def give_back(device: torch.device) -> None:
    """Returns what PyTorch's CUDA allocator keeps for later, and tensors in reference cycles; it is slow."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> int:
    """Starts the peak anew where that is possible. -> bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: VmHWM := VmRSS
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak(device)


def peak(device: torch.device) -> int:
    """Largest resident size (CUDA: allocated) in bytes.

    `VmHWM` where Linux gives it: unlike `ru_maxrss` it does not start at the size of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
