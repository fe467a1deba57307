"""The two ceilings of the machine at hand, measured. The FLOPs and bytes that they bound: `gircse.roofline`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.timing import synchronize
from gircse.ops.tiles_torch import matmul_nt
from gircse.roofline import Ceilings


def measure_ceilings(device: str | torch.device, dtype: torch.dtype, *, seconds: float = 0.6) -> Ceilings:
    """The best of several runs of large matrix products, and of copying and summing a large tensor."""
    device = torch.device(device)
    big = device.type == "cuda"
    size, megabytes = (8192, 2048) if big else (2048, 256)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products: list[Callable[[], Tensor]] = [lambda: a @ b, lambda: matmul_nt(a, b)]  # BLAS; oneDNN where it is faster
    product = min(_best(run, device, seconds) for run in products)
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    traffic = source.numel() * source.itemsize
    copy = _best(lambda: target.copy_(source), device, seconds)
    read = _best(source.sum, device, seconds)
    return Ceilings(2 * size**3 / product, max(2 * traffic / copy, traffic / read))


def _best(run: Callable[[], Any], device: torch.device, seconds: float, *, at_least: int = 4) -> float:
    """Seconds of the fastest of several runs after one that is not counted."""
    run()
    best, started, done = float("inf"), time.perf_counter(), 0
    while done < at_least or (time.perf_counter() - started < seconds and done < 50):
        synchronize(device)
        before = time.perf_counter()
        run()
        synchronize(device)
        best, done = min(best, time.perf_counter() - before), done + 1
    return best
