"""The two ceilings of the machine at hand, measured. The FLOPs and bytes that they bound: `gircse.roofline`."""

from __future__ import annotations

import torch

from bench.timing import for_about
from gircse.ops.tiles_torch import matmul_nt
from gircse.roofline import Ceilings


def measure_ceilings(device: str | torch.device, dtype: torch.dtype, *, seconds: float = 0.6) -> Ceilings:
    """The best of several runs of large matrix products, and of copying and summing a large tensor; each of the four
    runs for about `seconds`."""
    device = torch.device(device)
    size, megabytes = (8192, 2048) if device.type == "cuda" else (2048, 256)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    runs = {
        "BLAS": lambda: a @ b,
        "oneDNN": lambda: matmul_nt(a, b),
        "copy": lambda: target.copy_(source),
        "read": source.sum,
    }
    for run in runs.values():
        run()
    best = {name: min(timing.runs) for name, timing in for_about(runs, device, 4 * seconds, fewest=4).items()}
    traffic = source.numel() * source.itemsize
    return Ceilings(
        2 * size**3 / min(best["BLAS"], best["oneDNN"]), max(2 * traffic / best["copy"], traffic / best["read"])
    )
