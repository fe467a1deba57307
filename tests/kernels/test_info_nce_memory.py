"""The memory that `stepwise_info_nce` needs beyond inputs and gradients, counted on meta tensors at its full sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gircse_kernels import info_nce as kernels
from gircse_kernels import launching
from torch import Tensor

from bench.static.launches import Allocations
from gircse.ops import info_nce_op, info_nce_torch, stepwise_info_nce, tiles_torch
from gircse.ops.info_nce_reference import info_nce_reference

LARGE = (4096, 8192, 5, 3584)  # B, M, K, D of a 7B model
VERY_LARGE = (65_536, 131_072, 5, 1024)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend takes meta tensors, and its launches do nothing."""
    monkeypatch.setattr(info_nce_op, "_module", lambda *_: kernels)
    monkeypatch.setattr(launching, "launch", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none on meta


def extra_bytes(
    loss: Callable[..., Tensor], size: tuple[int, int, int, int], dtype: torch.dtype, device: str, **options: Any
) -> int:
    """Peak of forward and backward, without the gradients that come out."""
    rows, candidates, num_steps, width = size
    with Allocations() as counted:
        steps = [
            torch.zeros(n, num_steps, width, dtype=dtype, device=device, requires_grad=True) for n in (rows, candidates)
        ]
        before = counted.alive
        grads = torch.autograd.grad(loss(*steps, **options).sum(), steps)
    return counted.peak - before - sum(grad.numel() * grad.itemsize for grad in grads)


def eager(queries: Tensor, docs: Tensor, **options: Any) -> Tensor:
    return info_nce_reference(queries.float(), docs.float(), **options)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"include_queries": True, "symmetric": True}], ids=["plain", "all options"])
def test_a_sixth_of_eager(dtype: torch.dtype, options: dict[str, bool]) -> None:
    ours, theirs = (extra_bytes(loss, LARGE, dtype, "meta", **options) for loss in (stepwise_info_nce, eager))
    assert theirs > 3e9
    assert ours <= theirs / 6


@pytest.mark.usefixtures("on_meta")
def test_a_fifth_of_eager_of_a_batch_of_a_thousand() -> None:
    ours, theirs = (
        extra_bytes(loss, (1024, 2048, 5, 896), torch.float32, "meta") for loss in (stepwise_info_nce, eager)
    )
    assert ours <= theirs / 5


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_very_large_batch_fits(dtype: torch.dtype) -> None:
    """The similarities would be 172 GB."""
    assert extra_bytes(stepwise_info_nce, VERY_LARGE, dtype, "meta") < 2e9


def test_a_tenth_of_eager_in_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """LARGE with all extents and all budgets scaled down alike, so that the shares of memory are the same."""
    for module, name in (
        (info_nce_op, "VECTOR_BYTES"),
        (tiles_torch, "WORKSPACE_BYTES"),
        (info_nce_torch, "BLOCK_BYTES"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) // 16**2)
    for name in ("VOCAB_CHUNK", "ROW_TILE"):
        monkeypatch.setattr(tiles_torch, name, getattr(tiles_torch, name) // 16)
    rows, candidates, num_steps, width = LARGE
    size = (rows // 16, candidates // 16, num_steps, width // 16)
    ours, theirs = (extra_bytes(loss, size, torch.float32, "cpu") for loss in (stepwise_info_nce, eager))
    assert ours <= theirs / 10
