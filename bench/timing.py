"""Clocks, synchronisation, caches, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Repeated measurements of one thing.

    Attributes:
        seconds: their median.
        spread: (largest - smallest) / median.
        runs: all of them, in order, in seconds.
    """

    seconds: float
    spread: float
    runs: list[float]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Timing:
        median = statistics.median(runs)
        return cls(median, (max(runs) - min(runs)) / median, list(runs))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    before = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - before


def interleaved(runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, Timing]:
    """All of them in turn, `repeats` times, so that drifts of the machine hit them alike; they must be warmed up.

    On CUDA with events, from the end of writing a buffer larger than the L2 cache to the end of the run: matrices come
    from memory, as in a model, whose layers pass through the cache between two calls. The host runs ahead while the
    buffer is written, so most of its launches cost nothing here (`enqueue_seconds` has them).
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if device.type != "cuda":
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(seconds(run, device))
        return {name: Timing.of(found) for name, found in times.items()}
    with torch.cuda.device(device):
        buffer = cache_buffer(device)
        for _ in range(repeats):
            events = {}
            for name, run in runs.items():
                events[name] = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
                buffer.zero_()
                events[name][0].record()
                run()
                events[name][1].record()
            synchronize(device)
            for name, (start, end) in events.items():
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing.of(found) for name, found in times.items()}


def for_about(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, budget: float, *, fewest: int, most: int = 50
) -> dict[str, Timing]:
    """`interleaved`, so often that all runs together take about `budget` seconds."""
    once = sum(seconds(run, device) for run in runs.values())
    return interleaved(runs, device, max(fewest, min(most, int(budget / max(once, 1e-6)))))


def captured(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """The run as a CUDA graph. -> its replay, and what must be kept alive as long as it is replayed.

    Raises:
        RuntimeError: it cannot be captured, or there is no memory for it.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # capture wants its libraries warm on a stream that is not the default one
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    graph.replay()
    return graph.replay, (graph, result)


def cache_buffer(device: torch.device) -> torch.Tensor:
    """Writing this evicts everything else from the L2 cache: 256 MiB, or twice the cache where that is more."""
    properties: Any = torch.cuda.get_device_properties(device)
    return torch.empty(max(256 << 20, 2 * properties.L2_cache_size), dtype=torch.uint8, device=device)


def enqueue_seconds(run: Callable[[], Any], device: torch.device, repeats: int = 30) -> float:
    """Median time until the host has launched a call on an idle CUDA device, whose own work is not waited for."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    synchronize(device)
    return statistics.median(times)
