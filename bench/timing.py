"""Clocks, synchronisation, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
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
