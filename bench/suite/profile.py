"""Where the time of a step goes: the costliest device kernels, launches, device against wall time, host functions."""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench.timing import seconds, synchronize

_MOST = 20
_WIDTH = 150


def profile(what: str, run: Callable[[], Any], device: torch.device, *, steps: int = 1) -> str:
    """A page of text on a call that has been warmed up.

    Args:
        steps: how many steps the call takes; launches and times are shown for each.
    """
    wall, cuda = statistics.median(seconds(run, device) for _ in range(3)), device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(device)
    events: list[Any] = list(profiler.key_averages())
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    times = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [(getattr(event, times) / 1e6, event.count, event.key) for event in events if event.device_type == wanted]
    rows.sort(reverse=True)
    busy, launches = sum(took for took, _, _ in rows), sum(count for _, count, _ in rows)
    kind = "kernels" if cuda else "operators (no GPU: their own time on the CPU)"
    lines = [
        what,
        f"wall {1e3 * wall:.3f} ms, device busy {1e3 * busy:.3f} ms ({busy / wall:.0%}), {launches} launches",
        f"a step of {steps}: wall {1e3 * wall / steps:.3f} ms, device {1e3 * busy / steps:.3f} ms, "
        f"{launches / steps:.1f} launches",
        "",
        f"the {min(_MOST, len(rows))} costliest of {len(rows)} {kind}: ms, share, launches, name",
        *(
            f"{1e3 * took:9.3f}  {took / busy if busy else 0:6.1%}  {count:6d}  {name}"[:_WIDTH]
            for took, count, name in rows[:_MOST]
        ),
        "",
        "host functions by their own time (under a profiler, which slows all of them)",
    ]
    host, text = cProfile.Profile(), io.StringIO()
    host.runcall(run)
    synchronize(device)
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(_MOST)
    table = text.getvalue().split("Ordered by", 1)[-1].splitlines()[1:]
    return "\n".join([*lines, *(line[:_WIDTH] for line in table if line.strip())]) + "\n"
