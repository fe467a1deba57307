"""The contrastive kernels on the GPU against float64, and the memory that they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import stepwise_info_nce
from gircse.ops.info_nce_reference import info_nce_reference
from tests.ops.test_info_nce_options import FLAGS, problem, with_gradients


def on_gpu(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to("cuda", dtype if k.endswith("steps") else None) for k, v in arguments.items()}


@pytest.mark.parametrize(("masked", "include_queries", "symmetric"), FLAGS)
@pytest.mark.parametrize(("rows", "candidates"), [(1, 1), (16, 48), (70, 333), (300, 1000)])
def test_against_float64(masked: bool, include_queries: bool, symmetric: bool, rows: int, candidates: int) -> None:
    arguments = problem(rows, candidates, masked=masked)
    options = {"include_queries": include_queries, "symmetric": symmetric, "temperature": 0.1}
    upstream = torch.randn(3, device="cuda", dtype=torch.float64)
    exact = with_gradients(info_nce_reference, {**on_gpu(arguments, torch.float64), **options}, upstream)
    ours = with_gradients(
        stepwise_info_nce, {**on_gpu(arguments, torch.float32), **options, "backend": "triton"}, upstream
    )
    for got, want in zip(ours[:3], exact[:3], strict=True):
        assert (got.double() - want).abs().max() <= 5e-5 * (want.abs().max() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [100, 896, 3584])
def test_wide_vectors_at_the_default_temperature(dtype: torch.dtype, width: int) -> None:
    """The error of a logit at temperature 0.02 is far below what rounding similarities to bfloat16 costs, 0.1."""
    queries = torch.randn(200, 5, width, device="cuda").to(dtype)
    docs = (torch.randn(600, 5, width, device="cuda") + queries.repeat_interleave(3, 0)).to(dtype)
    exact = info_nce_reference(queries.double(), docs.double())
    ours = stepwise_info_nce(queries, docs, backend="triton")
    assert (ours.double() - exact).abs().max() < 1e-4


def test_two_runs_are_bitwise_equal() -> None:
    arguments = {**on_gpu(problem(300, 1000, masked=True), torch.float32), "include_queries": True, "symmetric": True}
    first, second = (with_gradients(stepwise_info_nce, arguments, torch.ones(3, device="cuda")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def extra_bytes(loss: Callable[[Tensor, Tensor], Tensor], queries: Tensor, docs: Tensor) -> int:
    """Peak of forward and backward, without the gradients that come out."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(loss(queries, docs).sum(), (queries, docs))
    return torch.cuda.max_memory_allocated() - before - sum(grad.numel() * grad.itemsize for grad in grads)


def test_a_sixth_of_the_memory_of_eager() -> None:
    """B = 4,096, M = 8,192, K = 5, D = 3,584 in float32; tests/kernels/test_info_nce_memory.py counts the same."""
    queries, docs = (torch.randn(n, 5, 3584, device="cuda", requires_grad=True) for n in (4096, 8192))
    ours, eager = (extra_bytes(loss, queries, docs) for loss in (stepwise_info_nce, info_nce_reference))
    assert ours <= eager / 6


def test_memory_of_a_very_large_batch() -> None:
    """B = 65,536, M = 131,072, K = 5, D = 1,024, forward and backward, beside the gradients: the similarities would be
    172 GB."""
    queries = torch.randn(65_536, 5, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    docs = torch.randn(131_072, 5, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert extra_bytes(stepwise_info_nce, queries, docs) < 4e9
    assert stepwise_info_nce(queries.detach(), docs.detach()).isfinite().all()
