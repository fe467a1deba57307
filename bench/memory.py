"""Peak memory of a call: the most that it allocates above what was there before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

from bench.timing import synchronize

# What a record's bytes are, for its readers.
COUNTED = {
    "cuda": "what PyTorch's allocator had at most above what was there before the call, results included",
    "cpu": (
        "tensors at the peak above what was there before the call, results included, as PyTorch's profiler sees them; "
        "scratch inside libraries is not counted, buffers of keys and values are in full"
    ),
}


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Of one call that has been warmed up; its results count.

    On CUDA the allocator counts. On a CPU PyTorch's profiler counts allocations and releases, which is exact for
    tensors but does not see the scratch of libraries.
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
    """Frees tensors in reference cycles and what PyTorch's CUDA allocator keeps for later, which is slow."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
