"""What soft_embed holds: tiles, and never a tensor of [rows, vocabulary]."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gircse.ops import soft_embed, tiles_torch


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operator returned, views of existing ones aside."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_no_tensor_of_rows_times_vocabulary(dtype: torch.dtype) -> None:
    """V is large and D small, so that [T, V] would be far larger than anything that may be allocated."""
    rows, vocab, width = 1500, 40_000, 8
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    with LargestTensor([hidden, head]) as mode:
        out, stats = soft_embed(hidden, head, return_stats=True, backend="torch")
        (out.float().square().sum() + stats.entropy.sum() + stats.lse.sum()).backward()
    tile = 4 * tiles_torch.ROW_TILE * tiles_torch.VOCAB_CHUNK
    assert tile <= mode.largest <= max(tile, vocab * width * 4) < rows * vocab


@pytest.mark.parametrize(("width", "rows"), [(64, 3000), (4096, 600), (16384, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_budget_of_a_tile(width: int, rows: int, dtype: torch.dtype) -> None:
    """The tiling keeps what backward holds at once within the budget for any width."""
    itemsize = 8 if dtype == torch.float64 else 4
    tile, chunk = tiles_torch.tiling(rows, 200_000, tiles=7, per_vocab=5 * width, per_row=width, itemsize=itemsize)
    assert itemsize * (7 * tile * chunk + 5 * width * chunk + width * tile) <= tiles_torch.WORKSPACE_BYTES
    assert tile >= 16
    assert chunk >= 16


PEAK_SCRIPT = """
import resource, sys, torch
from gircse.ops import soft_embed
torch.set_num_threads(2)
rows, vocab, width = 256, 60_000, 512
hidden = torch.randn(rows, width, requires_grad=True)
head = torch.randn(vocab, width)
upstream = torch.randn(rows, width)
small = torch.randn(8, width, requires_grad=True)
soft_embed(small, head).sum().backward()  # libraries, thread pools, page tables
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
soft_embed(hidden, head).backward(upstream)
print(peak() - before)
"""


def test_memory_peak_of_the_process() -> None:
    """The promise itself: 64 MiB and four [T, D] matrices beyond the inputs; eager needs [T, V], 59 MiB, four times."""
    done = subprocess.run([sys.executable, "-c", PEAK_SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    extra = int(done.stdout)
    assert extra <= (64 << 20) + 4 * 256 * 512 * 4
