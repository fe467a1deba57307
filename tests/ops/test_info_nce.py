"""stepwise_info_nce and its pooling against the float64 definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gircse.ops import info_nce_torch, l2_normalize, pool_steps, stepwise_info_nce, tiles_torch
from gircse.ops.info_nce_reference import info_nce_reference, pool_steps_reference

POOLINGS = ["mean", "last", "weighted"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, tiles and groups of steps, the last of each ragged, at the shapes of these tests."""
    shrink(monkeypatch)


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tiles_torch, "VOCAB_CHUNK", 8)
    patch.setattr(tiles_torch, "ROW_TILE", 3)
    patch.setattr(info_nce_torch, "BLOCK_BYTES", 3 * 3 * 8 * 4)  # similarities of three steps in float32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes this small gain nothing from threads, and on a busy machine each parallel loop waits for a time slice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(
    function: Any, tensors: list[Tensor], dtype: torch.dtype, target: Tensor | None, **options: Any
) -> list[Tensor]:
    """Losses and the gradients of both step tensors, under a random upstream gradient that every dtype represents."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    losses = function(*leaves, target, **options)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(losses.shape, generator=generator).bfloat16().half().to(losses.dtype)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_accuracy(dtype: torch.dtype, pooling: str, temperature: float) -> None:
    """Error against float64 <= 2x that of eager in float32, where the op computes, plus a unit of rounding."""
    tensors = [torch.randn(7, 4, 5).to(dtype), torch.randn(28, 4, 5).to(dtype)]
    options = {"temperature": temperature, "pooling": pooling}
    ours = run(stepwise_info_nce, tensors, dtype, None, **options)
    eager = run(info_nce_reference, tensors, torch.float32, None, **options)
    truth = run(info_nce_reference, tensors, torch.float64, None, **options)
    assert [tensor.dtype for tensor in ours] == [torch.float32, dtype, dtype]
    for mine, plain, exact in zip(ours, eager, truth, strict=True):
        rounding = torch.finfo(mine.dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8),
    candidates=st.integers(1, 20),
    steps=st.integers(1, 4),
    width=st.integers(1, 6),
    pooling=st.sampled_from(POOLINGS),
)
def test_any_shape_and_target(rows: int, candidates: int, steps: int, width: int, pooling: str) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + candidates)
    tensors = [torch.randn(n, steps, width, generator=generator) for n in (rows, candidates)]
    target = torch.randint(candidates, (rows,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        ours = run(stepwise_info_nce, tensors, torch.float64, target, temperature=0.1, pooling=pooling)
    truth = run(info_nce_reference, tensors, torch.float64, target, temperature=0.1, pooling=pooling)
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(pooling: str) -> None:
    queries = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    docs = torch.randn(12, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 11, 5, 5])
    assert torch.autograd.gradcheck(
        lambda q, d: stepwise_info_nce(q, d, target, temperature=0.3, pooling=pooling), (queries, docs)
    )


def test_default_target_is_the_first_candidate_of_each_row() -> None:
    queries, docs = torch.randn(3, 2, 4), torch.randn(12, 2, 4)
    assert torch.equal(stepwise_info_nce(queries, docs), stepwise_info_nce(queries, docs, torch.tensor([0, 4, 8])))


def test_only_the_gradient_asked_for() -> None:
    queries, docs = torch.randn(5, 2, 4), torch.randn(10, 2, 4)
    both = run(stepwise_info_nce, [queries, docs], torch.float32, None)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(2, generator=generator).bfloat16().half().float()
    for wanted in (0, 1):
        leaves = [queries.clone(), docs.clone()]
        leaves[wanted].requires_grad_()
        stepwise_info_nce(*leaves).backward(upstream)
        grad = leaves[wanted].grad
        assert grad is not None
        assert torch.equal(grad, both[1 + wanted])
        assert leaves[1 - wanted].grad is None
    assert not stepwise_info_nce(queries, docs).requires_grad


def test_second_backward_gives_the_same() -> None:
    leaves = [torch.randn(5, 2, 4, requires_grad=True), torch.randn(10, 2, 4, requires_grad=True)]
    losses = stepwise_info_nce(*leaves)
    first = torch.autograd.grad(losses, leaves, torch.ones(2), retain_graph=True)
    second = torch.autograd.grad(losses, leaves, torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_logits_of_minus_200() -> None:
    """All 65 similarities are -1, at temperature 1/200: log 65, not -inf or NaN."""
    queries = torch.tensor([1.0, 0.0]).expand(3, 2, 2).clone().requires_grad_()
    docs = torch.tensor([-1.0, 0.0]).expand(65, 2, 2).clone().requires_grad_()
    losses = stepwise_info_nce(queries, docs, torch.tensor([0, 30, 64]), temperature=1 / 200)
    torch.testing.assert_close(losses, torch.full((2,), math.log(65)), rtol=1e-6, atol=0.0)
    grads = torch.autograd.grad(losses.sum(), [queries, docs])
    assert all(grad.isfinite().all() for grad in grads)


def test_one_candidate_has_no_loss_and_no_gradient() -> None:
    leaves = [torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)]
    losses = stepwise_info_nce(*leaves)
    assert torch.equal(losses, torch.zeros(3))
    assert all(not grad.any() for grad in torch.autograd.grad(losses.sum(), leaves))


def test_equal_candidates_give_the_logarithm_of_their_number() -> None:
    queries, docs = torch.randn(4, 3, 5), torch.randn(1, 3, 5).expand(20, 3, 5)
    torch.testing.assert_close(stepwise_info_nce(queries, docs), torch.full((3,), math.log(20)), rtol=1e-5, atol=0.0)


def test_small_losses_are_not_rounded_away() -> None:
    """The target leads by about 16: the loss is near 1e-7 while the logits are 50, whose float32 spacing is 4e-6."""
    query = torch.tensor([[1.0, 0.0]])
    docs = torch.tensor([[1.0, 0.0], [0.68, math.sqrt(1 - 0.68**2)]])
    losses = stepwise_info_nce(query[:, None], docs[:, None], torch.tensor([0]))
    exact = info_nce_reference(query[:, None].double(), docs[:, None].double(), torch.tensor([0]))
    assert 5e-8 < exact.item() < 2e-7
    torch.testing.assert_close(losses.double(), exact, rtol=0.0, atol=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_are_zero_embeddings_without_gradient(dtype: torch.dtype) -> None:
    queries, docs = torch.randn(4, 2, 5, dtype=dtype), torch.randn(8, 2, 5, dtype=dtype)
    queries[1], docs[3] = 0.0, 0.0
    queries.requires_grad_()
    docs.requires_grad_()
    losses = stepwise_info_nce(queries, docs)
    grad_queries, grad_docs = torch.autograd.grad(losses.sum(), [queries, docs])
    torch.testing.assert_close(losses, info_nce_reference(queries, docs), rtol=1e-5, atol=0.0)
    assert grad_queries.isfinite().all()
    assert grad_docs.isfinite().all()
    assert not grad_queries[1].any()
    assert not grad_docs[3].any()
    only_zero = stepwise_info_nce(torch.zeros(2, 1, 3, dtype=dtype), torch.zeros(6, 1, 3, dtype=dtype))
    torch.testing.assert_close(only_zero, torch.full((1,), math.log(6), dtype=dtype), rtol=1e-6, atol=0.0)


def test_nan_stays_in_its_step() -> None:
    queries, docs = torch.randn(4, 3, 5), torch.randn(8, 3, 5)
    clean = stepwise_info_nce(queries, docs)
    queries[2, 2] = torch.nan
    losses = stepwise_info_nce(queries, docs)
    assert torch.equal(losses[:2], clean[:2])
    assert losses[2].isnan()


def test_autocast_keeps_float32_similarities() -> None:
    leaves = [torch.randn(5, 2, 4, requires_grad=True), torch.randn(10, 2, 4, requires_grad=True)]
    plain = stepwise_info_nce(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = stepwise_info_nce(*leaves)
        inside = torch.autograd.grad(losses.sum(), leaves)
    assert torch.equal(losses, plain)
    assert all(torch.equal(a, b) for a, b in zip(inside, torch.autograd.grad(plain.sum(), leaves), strict=True))


def test_non_contiguous_steps() -> None:
    queries, docs = torch.randn(2, 5, 4).transpose(0, 1), torch.randn(4, 2, 10).permute(2, 1, 0)
    torch.testing.assert_close(
        stepwise_info_nce(queries, docs),
        stepwise_info_nce(queries.contiguous(), docs.contiguous()),
        rtol=1e-6,
        atol=0.0,
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (2, 3, 1, 4), (0, 3, 4)])
def test_pooling_is_its_definition(pooling: str, shape: tuple[int, ...]) -> None:
    steps = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(pool_steps(steps, pooling), pool_steps_reference(steps, pooling), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_prefixes_and_gradient(pooling: str) -> None:
    steps = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    whole = pool_steps(steps, pooling)
    for k in range(1, 6):
        assert torch.equal(whole[:, :k], pool_steps(steps[:, :k], pooling))
    assert torch.autograd.gradcheck(lambda x: l2_normalize(pool_steps(x, pooling)), steps)
    assert pool_steps(steps.bfloat16(), pooling).dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "pooling", "error", "message"),
    [
        ([[1.0]], "mean", TypeError, r"steps: got list, expected a floating-point tensor"),
        (torch.ones(2, 3, dtype=torch.int64), "mean", TypeError, r"steps: got torch.int64, expected a floating-point"),
        (torch.ones(3), "last", ValueError, r"steps: got shape \(3,\), expected \[..., K, D\]"),
        (torch.ones(2, 3), "median", ValueError, r"pooling: got 'median', expected one of 'mean', 'last', 'weighted'"),
    ],
)
def test_pool_steps_names_what_is_wrong(steps: Any, pooling: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pool_steps(steps, pooling)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_steps": torch.randn(2, 3)}, ValueError, r"query_steps: got shape \(2, 3\), expected \[B, K, D\]"),
        (
            {"query_steps": torch.randn(0, 3, 4)},
            ValueError,
            r"query_steps: got shape \(0, 3, 4\), expected \[B, K, D\]",
        ),
        ({"doc_steps": torch.ones(4, 3, 4).long()}, TypeError, r"doc_steps: got dtype torch.int64"),
        ({"doc_steps": torch.randn(4, 2, 4)}, ValueError, r"doc_steps: got shape \(4, 2, 4\), expected the K and D"),
        (
            {"doc_steps": torch.randn(4, 3, 4).half()},
            TypeError,
            r"doc_steps: got dtype torch.float16, expected torch.float32",
        ),
        ({"doc_steps": torch.randn(4, 3, 4, device="meta")}, ValueError, r"doc_steps: got device meta, expected cpu"),
        (
            {"doc_steps": torch.randn(3, 3, 4)},
            ValueError,
            r"doc_steps: got 3 candidates for 2 rows, expected a multiple",
        ),
        (
            {"doc_steps": torch.randn(1, 3, 4)},
            ValueError,
            r"doc_steps: got 1 candidates for 2 rows, expected a multiple",
        ),
        ({"target": torch.tensor([0])}, ValueError, r"target: got shape \(1,\), expected \(2,\)"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, r"target: got torch.float32, expected an int64 tensor"),
        ({"target": torch.tensor([0, 4])}, ValueError, r"target: got 0 to 4, expected 0 to 3"),
        ({"target": torch.tensor([-1, 2])}, ValueError, r"target: got -1 to 2, expected 0 to 3"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0.0, expected a finite number above 0"),
        ({"pooling": "max"}, ValueError, r"pooling: got 'max', expected one of 'mean', 'last', 'weighted'"),
        ({"mask": torch.ones(2, 4)}, TypeError, r"mask: got torch.float32, expected a bool tensor"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, r"mask: got shape \(2, 3\), expected \(2, 4\)"),
        (
            {"mask": torch.tensor([[False] * 4, [False, False, True, False]])},
            ValueError,
            r"mask: got True at the target of row 1, 2, expected it to count",
        ),
        ({"symmetric": 1}, TypeError, r"symmetric: got int, expected a bool"),
        ({"include_queries": None}, TypeError, r"include_queries: got NoneType, expected a bool"),
        ({"group": object()}, RuntimeError, r"group: torch.distributed is not initialised"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query_steps": torch.randn(2, 3, 4), "doc_steps": torch.randn(4, 3, 4), **change}
    with pytest.raises(error, match=message):
        stepwise_info_nce(**arguments)


def test_l2_normalize_of_no_dimensions() -> None:
    assert l2_normalize(torch.ones(3, 0)).shape == (3, 0)
