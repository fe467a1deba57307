"""The contrastive kernels in Triton's interpreter against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels import info_nce
from gircse_kernels.plan import Config
from torch import Tensor

from gircse.ops.pooling import POOLINGS, l2_normalize, pool_steps

pytestmark = pytest.mark.usefixtures("interpreter")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


# every pooling in every dtype, and one of them in every width
@pytest.mark.parametrize(
    ("pooling", "width"), [*((pooling, 100) for pooling in POOLINGS), *(("mean", width) for width in (5, 64))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pool(pooling: str, dtype: torch.dtype, width: int) -> None:
    steps = normal(7, 4, width, dtype=dtype)
    steps[3] = 0  # no direction: zero, and a zero gradient
    leaf = steps.double().requires_grad_()
    exact = l2_normalize(pool_steps(leaf, pooling)).transpose(0, 1)
    pooled = info_nce.pool(steps, pooling)
    parts = 3 if dtype == torch.float32 else 2
    assert pooled.vectors.shape == (4, 7, parts, width)
    # bits of a part: eight, of which the interpreter, which cuts off, loses one
    error = max(2.0 ** -(7 * parts), 1e-6)
    torch.testing.assert_close(pooled.vectors.double().sum(2), exact, rtol=error, atol=1e-6)
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
    torch.testing.assert_close(info_nce.pool(steps, "mean").vectors.float().sum(2), exact, rtol=1e-6, atol=1e-6)


def split(vectors: Tensor, parts: int) -> Tensor:
    """bfloat16 parts of vectors [K, B, D] as `pool` makes them, [K, B, P, D]."""
    found = []
    for _ in range(parts):
        found.append(vectors.bfloat16())
        vectors = vectors - found[-1].float()
    return torch.stack(found, 2)


def problem(rows: int, candidates: int, parts: int = 3) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments, and the vectors that their parts were made of."""
    vectors = [torch.nn.functional.normalize(normal(3, n, 21), dim=-1) for n in (rows, candidates)]
    target = torch.randint(0, candidates, (rows,))
    return {"rows": split(vectors[0], parts), "candidates": split(vectors[1], parts), "target": target}, vectors


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


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 40 candidates has several blocks, the last one ragged."""
    monkeypatch.setattr(info_nce, "_ROW", Config({"BLOCK": 16}, 4, 1))


@pytest.mark.parametrize(
    ("rows", "candidates", "temperature", "parts", "masked", "excluded"),
    [
        *((37, 75, *numbers, *options) for numbers in ((0.02, 3), (1.0, 2)) for options in OPTIONS),
        *((*sizes, 0.02, 3, *options) for sizes in ((1, 40), (20, 1)) for options in (OPTIONS[0], OPTIONS[3])),
    ],
)
def test_sums_and_gradients(
    rows: int, candidates: int, masked: bool, excluded: bool, temperature: float, parts: int
) -> None:
    tensors, vectors = problem(rows, candidates, parts)
    target = tensors["target"]
    mask = exclude = None
    if masked:
        mask = torch.rand(rows, candidates) < 0.3
        mask[torch.arange(rows), target] = False
    if excluded:
        exclude = torch.where(torch.arange(rows) % 3 == 0, -1, (target + 1) % candidates)
        exclude = torch.where(exclude == target, -1, exclude)
    leaves = [each.double().requires_grad_() for each in vectors]
    logits = definition(*leaves, target, mask, exclude, temperature)
    index = target[None, :, None].expand(3, rows, 1)
    positive = logits.gather(2, index)[..., 0]
    losses = (torch.logsumexp(logits, -1) - positive).mean(1)
    found = info_nce.sums(**tensors, temperature=temperature, mask=mask, exclude=exclude)
    assert (found.positive.double() - positive).abs().max() < 1e-5
    ours = (found.total.log() + (found.peak - found.positive)).mean(1)
    torch.testing.assert_close(ours.double(), losses, rtol=1e-5, atol=1e-5)
    others = logits.detach().scatter(2, index, -torch.inf).amax(2)
    torch.testing.assert_close(found.hardest.double(), others, rtol=1e-5, atol=1e-5)
    upstream = normal(3)
    wanted = torch.autograd.grad(losses, leaves, upstream.double())
    before = normal(*vectors[0].shape) * wanted[0].abs().max()  # gradients of the rows are added
    grad_rows = before.clone()
    grad_candidates = info_nce.gradients(
        **tensors, temperature=temperature, peak=found.peak, total=found.total, weight=upstream / rows,
        mask=mask, exclude=exclude, grad_rows=grad_rows,
    )  # fmt: skip
    tolerance = 1e-5 if parts == 3 else 1e-4
    for one, exact in zip((grad_rows - before, grad_candidates), wanted, strict=True):
        assert one is not None
        assert (one.double() - exact).abs().max() <= tolerance * (exact.abs().max() + 1e-3)


def test_two_parts_keep_logits_at_the_lowest_temperature() -> None:
    """The error of a logit at temperature 0.02 stays below 1e-4, also where query and document are nearly the same, so
    that what is left out adds up."""
    queries = torch.nn.functional.normalize(normal(1, 16, 896), dim=-1)
    docs = torch.nn.functional.normalize(queries + 0.1 * normal(1, 16, 896) / 30, dim=-1)
    found = info_nce.sums(split(queries, 2), split(docs, 2), torch.arange(16), 0.02)
    exact = (queries.double() * docs.double()).sum(-1) / 0.02
    assert (found.positive.double() - exact).abs().max() < 1e-4


def test_only_the_gradients_asked_for() -> None:
    tensors, vectors = problem(37, 75)
    found = info_nce.sums(**tensors, temperature=0.1)
    arguments = {**tensors, "temperature": 0.1, "peak": found.peak, "total": found.total, "weight": torch.ones(3)}
    both, rows = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    candidates = info_nce.gradients(**arguments, grad_rows=both)
    assert candidates is not None
    only = info_nce.gradients(**arguments)
    assert only is not None
    assert torch.equal(only, candidates)
    assert info_nce.gradients(**arguments, grad_rows=rows, need_candidates=False) is None
    assert torch.equal(rows, both)


def test_sums_go_on_with_other_candidates() -> None:
    tensors, _ = problem(9, 60)
    whole = info_nce.sums(**tensors, temperature=0.05)
    parts = None
    for start, stop in ((0, 23), (23, 60)):
        inside = (tensors["target"] >= start) & (tensors["target"] < stop)
        target = torch.where(inside, tensors["target"] - start, -1)
        parts = info_nce.sums(tensors["rows"], tensors["candidates"][:, start:stop], target, 0.05, into=parts)
    assert parts is not None
    for name, value in whole._asdict().items():
        torch.testing.assert_close(getattr(parts, name), value, rtol=1e-5, atol=1e-5)


def test_very_negative_logits() -> None:
    """Logits near -200: the sums stay finite."""
    rows = split(torch.nn.functional.normalize(normal(1, 4, 16), dim=-1), 3)
    found = info_nce.sums(rows[:, :1], -rows[:, :1].expand(1, 65, 3, 16), torch.zeros(1, dtype=torch.int64), 0.005)
    loss = found.total.log() + found.peak - found.positive
    torch.testing.assert_close(loss, torch.full((1, 1), 65.0).log(), rtol=1e-4, atol=1e-4)
