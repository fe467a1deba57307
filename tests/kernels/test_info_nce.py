"""The contrastive kernels in Triton's interpreter against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels import info_nce
from torch import Tensor

from gircse.ops.pooling import POOLINGS, l2_normalize, pool_steps
from tests.kernels.small_plans import small_plans

pytestmark = pytest.mark.usefixtures("interpreter")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [5, 64, 100])
def test_pool(pooling: str, dtype: torch.dtype, width: int) -> None:
    steps = normal(7, 4, width, dtype=dtype)
    steps[3] = 0  # no direction: zero, and a zero gradient
    leaf = steps.double().requires_grad_()
    exact = l2_normalize(pool_steps(leaf, pooling)).transpose(0, 1)
    pooled = info_nce.pool(steps, pooling)
    torch.testing.assert_close(pooled.vectors.double(), exact, rtol=1e-6, atol=1e-6)
    upstream = normal(4, 7, width)
    (wanted,) = torch.autograd.grad(exact, leaf, upstream.double())
    found = torch.empty(7, 4, width, dtype=dtype)
    info_nce.pool_gradient(upstream, pooled, pooling, found)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert not found[3].any()


def test_pool_reads_any_strides() -> None:
    steps = normal(4, 7, 30).transpose(0, 1)
    exact = l2_normalize(pool_steps(steps, "mean")).transpose(0, 1)
    torch.testing.assert_close(info_nce.pool(steps, "mean").vectors, exact, rtol=1e-6, atol=1e-6)


def problem(rows: int, candidates: int, width: int = 21, num_steps: int = 3) -> dict[str, Any]:
    unit = torch.nn.functional.normalize
    return {
        "rows": unit(normal(num_steps, rows, width), dim=-1),
        "candidates": unit(normal(num_steps, candidates, width), dim=-1),
        "target": torch.randint(0, candidates, (rows,)),
    }


def definition(
    rows: Tensor, candidates: Tensor, target: Tensor, mask: Tensor | None, exclude: Tensor | None, temperature: float
) -> Tensor:
    logits = rows @ candidates.transpose(1, 2) / temperature
    out = torch.zeros(logits.shape[1:], dtype=torch.bool)
    if mask is not None:
        out |= mask
    if exclude is not None:
        out |= torch.arange(logits.shape[2])[None] == exclude[:, None]
    return logits.masked_fill(out, -torch.inf)


OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("masked", "excluded"), OPTIONS)
@pytest.mark.parametrize("temperature", [0.02, 1.0])
@pytest.mark.parametrize(("rows", "candidates"), [(37, 75), (1, 40), (20, 1), (5, 33)])
def test_sums_and_gradients(rows: int, candidates: int, masked: bool, excluded: bool, temperature: float) -> None:
    tensors = problem(rows, candidates)
    target = tensors["target"]
    mask = exclude = None
    if masked:
        mask = torch.rand(rows, candidates) < 0.3
        mask[torch.arange(rows), target] = False
    if excluded:
        exclude = torch.where(torch.arange(rows) % 3 == 0, -1, (target + 1) % candidates)
        exclude = torch.where(exclude == target, -1, exclude)
    leaves = [tensors[name].double().requires_grad_() for name in ("rows", "candidates")]
    logits = definition(*leaves, target, mask, exclude, temperature)
    index = target[None, :, None].expand(3, rows, 1)
    losses = (torch.logsumexp(logits, -1) - logits.gather(2, index)[..., 0]).mean(1)
    with small_plans(False):
        found = info_nce.sums(**tensors, temperature=temperature, mask=mask, exclude=exclude)
        # a logit's error below 1e-4 at temperature 0.02
        positive = logits.gather(2, index)[..., 0]
        assert (found.positive.double() - positive).abs().max() < 1e-4
        ours = (found.total.log() + (found.peak - found.positive)).mean(1)
        torch.testing.assert_close(ours.double(), losses, rtol=1e-4, atol=1e-5)
        others = logits.detach().scatter(2, index, -torch.inf).amax(2)
        torch.testing.assert_close(found.hardest.double(), others, rtol=1e-4, atol=1e-4)
        upstream = normal(3)
        wanted = torch.autograd.grad(losses, leaves, upstream.double())
        before = normal(*tensors["rows"].shape) * wanted[0].abs().max()  # gradients of the rows are added
        grad_rows = before.clone()
        grad_candidates = info_nce.gradients(
            **tensors, temperature=temperature, peak=found.peak, total=found.total, weight=upstream / rows,
            mask=mask, exclude=exclude, grad_rows=grad_rows,
        )  # fmt: skip
    for one, exact in zip((grad_rows - before, grad_candidates), wanted, strict=True):
        assert one is not None
        assert (one.double() - exact).abs().max() <= 1e-4 * (exact.abs().max() + 1e-3)


def test_only_the_gradients_asked_for() -> None:
    tensors = problem(37, 75)
    with small_plans(False):
        found = info_nce.sums(**tensors, temperature=0.1)
        arguments = {**tensors, "temperature": 0.1, "peak": found.peak, "total": found.total, "weight": torch.ones(3)}
        both, rows = torch.zeros_like(tensors["rows"]), torch.zeros_like(tensors["rows"])
        candidates = info_nce.gradients(**arguments, grad_rows=both)
        assert candidates is not None
        only = info_nce.gradients(**arguments)
        assert only is not None
        assert torch.equal(only, candidates)
        assert info_nce.gradients(**arguments, grad_rows=rows, need_candidates=False) is None
        assert torch.equal(rows, both)


def test_merge_is_that_of_all_candidates() -> None:
    tensors = problem(9, 60)
    with small_plans(False):
        whole = info_nce.sums(**tensors, temperature=0.05)
        parts = []
        for start, stop in ((0, 23), (23, 60)):
            inside = (tensors["target"] >= start) & (tensors["target"] < stop)
            target = torch.where(inside, tensors["target"] - start, -1)
            candidates = tensors["candidates"][:, start:stop].contiguous()
            parts.append(info_nce.sums(tensors["rows"], candidates, target, 0.05))
        merged = parts[0].merge(parts[1])
    for name, value in whole._asdict().items():
        torch.testing.assert_close(getattr(merged, name), value, rtol=1e-5, atol=1e-5)


def test_very_negative_logits() -> None:
    """Logits near -200: the sums stay finite."""
    rows = torch.nn.functional.normalize(normal(1, 4, 16), dim=-1)
    candidates = -rows[:, :1].expand(1, 65, 16).contiguous()
    found = info_nce.sums(rows[:, :1].contiguous(), candidates, torch.zeros(1, dtype=torch.int64), 0.005)
    loss = found.total.log() + found.peak - found.positive
    torch.testing.assert_close(loss, torch.full((1, 1), 65.0).log(), rtol=1e-4, atol=1e-4)
