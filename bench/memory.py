"""Peak extra memory of a call, in this process: what it allocates at most above what was there before."""

from __future__ import annotations

import gc
import os
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
