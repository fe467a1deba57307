"""Masks, queries as negatives, the symmetric loss, statistics, both backends, several processes, bounded memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gircse.ops import InfoNCEStats, icr_objective, info_nce_op, pool_steps, stepwise_info_nce, tiles_torch
from gircse.ops.info_nce_reference import icr_objective_reference, info_nce_reference
from gircse.ops.pooling import POOLINGS, l2_normalize
from tests.ops.test_soft_embed_op import HAS_TRITON
from tests.ops.test_vocab_parallel import in_processes

BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=HAS_TRITON)])
FLAGS = list(itertools.product([False, True], repeat=3))  # masked, include_queries, symmetric


def problem(
    rows: int = 7, candidates: int = 19, *, masked: bool = False, queries_masked: bool = False, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, 3, 6, generator=generator, dtype=torch.float64)
    docs = torch.randn(candidates, 3, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, candidates, (rows,), generator=generator)
    found: dict[str, Any] = {"query_steps": queries, "doc_steps": docs, "target": target}
    if masked:
        mask = torch.rand(rows, candidates + rows * queries_masked, generator=generator) < 0.3
        mask[torch.arange(rows), target] = False
        found["mask"] = mask
    return found


def with_gradients(function: Any, arguments: dict[str, Any], upstream: Tensor) -> tuple[Any, ...]:
    leaves = [arguments[name].detach().clone().requires_grad_() for name in ("query_steps", "doc_steps")]
    result = function(leaves[0], leaves[1], **{k: v for k, v in arguments.items() if not k.endswith("steps")})
    losses, stats = result if isinstance(result, tuple) else (result, None)
    return losses, *torch.autograd.grad(losses, leaves, upstream.to(losses)), stats


@pytest.mark.parametrize(
    ("backend", "pooling", "masked", "include_queries", "symmetric"),
    [
        *(("torch", pooling, *flags) for pooling in POOLINGS for flags in FLAGS),
        *(pytest.param("triton", "mean", *flags, marks=HAS_TRITON) for flags in FLAGS),
        # pooling is a kernel of its own, before all that the flags say
        *(pytest.param("triton", pooling, True, True, True, marks=HAS_TRITON) for pooling in ("last", "weighted")),
    ],
)
def test_every_option_against_the_plain_formula(
    backend: str, masked: bool, include_queries: bool, symmetric: bool, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 5)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 3)
    itemsize = 8 if backend == "torch" else 6  # of a number of a unit vector
    if symmetric:  # two groups of steps, the second shorter
        monkeypatch.setattr(info_nce_op, "VECTOR_BYTES", 2 * 6 * (7 + 19) * itemsize)
    elif masked:  # pieces of a few candidates
        monkeypatch.setattr(info_nce_op, "VECTOR_BYTES", 5 * 6 * itemsize)
    arguments = {
        **problem(masked=masked, queries_masked=include_queries), "include_queries": include_queries,
        "symmetric": symmetric, "pooling": pooling, "temperature": 0.3,
    }  # fmt: skip
    upstream = torch.randn(3, dtype=torch.float64)
    exact = with_gradients(info_nce_reference, arguments, upstream)
    tolerance = 1e-10
    if backend == "triton":
        tolerance = 2e-5
        arguments = {k: v.float() if k.endswith("steps") else v for k, v in arguments.items()}
    ours = with_gradients(stepwise_info_nce, {**arguments, "backend": backend}, upstream)
    for got, want in zip(ours[:3], exact[:3], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("backend", "masked", "include_queries", "symmetric"),
    [
        *(("torch", *flags) for flags in FLAGS),
        *(pytest.param("triton", *flags, marks=HAS_TRITON) for flags in (FLAGS[0], FLAGS[-1])),
    ],
)
def test_pieces_are_the_whole(
    backend: str, masked: bool, include_queries: bool, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step and a few candidates at a time, in a dtype whose gradients must not be carried in it."""
    tensors = problem(masked=masked, queries_masked=include_queries)
    arguments = {k: v.bfloat16() if k.endswith("steps") else v for k, v in tensors.items()}
    arguments |= {"include_queries": include_queries, "symmetric": symmetric, "pooling": "weighted", "backend": backend}
    upstream = torch.randn(3)
    whole = with_gradients(stepwise_info_nce, {**arguments, "return_stats": True}, upstream)
    monkeypatch.setattr(info_nce_op, "VECTOR_BYTES", 4 * 6 * 4)
    pieces = with_gradients(stepwise_info_nce, {**arguments, "return_stats": True}, upstream)
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-5, atol=1e-6)
    for got, want in zip(pieces[1:3], whole[1:3], strict=True):
        # equal but for a unit of the last place where float32 sums round to either side
        assert (got != want).double().mean() < 0.05
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-9 * want.abs().max().item())
    for one, other in zip(pieces[3], whole[3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_a_transposed_mask(backend: str) -> None:
    arguments = {k: v.float() if k.endswith("steps") else v for k, v in problem(masked=True).items()}
    plain = stepwise_info_nce(**arguments, backend=backend)
    mask = arguments["mask"].T.contiguous().T
    assert torch.equal(stepwise_info_nce(**{**arguments, "mask": mask}, backend=backend), plain)


@BACKENDS
def test_a_query_that_is_masked_is_no_candidate(backend: str) -> None:
    """Copies of one query lie on it, and are all that is similar: log of their number without the mask, 0 with it. A
    mask of the documents alone leaves the queries as they are."""
    torch.manual_seed(0)
    row = torch.randn(1, 1, 16)
    steps = row.expand(4, 1, 16)
    options: dict[str, Any] = {"target": torch.zeros(4, dtype=torch.int64), "include_queries": True, "backend": backend}
    torch.testing.assert_close(stepwise_info_nce(steps, row, **options), torch.tensor([4.0]).log())
    documents = torch.zeros(4, 1, dtype=torch.bool)
    torch.testing.assert_close(stepwise_info_nce(steps, row, mask=documents, **options), torch.tensor([4.0]).log())
    both = torch.cat([documents, torch.ones(4, 4, dtype=torch.bool)], 1)
    assert stepwise_info_nce(steps, row, mask=both, **options).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 5\), expected \(4, 1\)$"):
        stepwise_info_nce(steps, row, **{**options, "mask": both, "include_queries": False})
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 3\), expected \(4, 1\) or \(4, 5\)$"):
        stepwise_info_nce(steps, row, mask=both[:, :3], **options)


@BACKENDS
def test_half_precision_steps(backend: str) -> None:
    arguments = {k: v.bfloat16() if k.endswith("steps") else v for k, v in problem().items()}
    upstream = torch.randn(3)
    ours = with_gradients(stepwise_info_nce, {**arguments, "backend": backend}, upstream)
    wide = {k: v.double() if k.endswith("steps") else v for k, v in arguments.items()}
    exact = with_gradients(info_nce_reference, wide, upstream)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.bfloat16
    # two bfloat16 parts of each vector keep 16 bits; in the interpreter, which cuts off, 14
    rtol = 1e-5 if backend == "torch" else 4e-5
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=rtol, atol=1e-5)
    for got, want in zip(ours[1:3], exact[1:3], strict=True):
        assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()  # the interpreter cuts off


def test_gradcheck() -> None:
    arguments = problem(4, 7, masked=True, queries_masked=True)
    options = {k: v for k, v in arguments.items() if not k.endswith("steps")}

    def function(queries: Tensor, docs: Tensor) -> Tensor:
        return stepwise_info_nce(queries, docs, **options, include_queries=True, symmetric=True, temperature=0.5)

    steps = [arguments[name].requires_grad_() for name in ("query_steps", "doc_steps")]
    assert torch.autograd.gradcheck(function, steps)


@BACKENDS
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_one_side_needs_a_gradient(backend: str, needed: tuple[bool, bool]) -> None:
    arguments = {k: v.float() if k.endswith("steps") else v for k, v in problem().items()}
    options = {"include_queries": True, "symmetric": True, "backend": backend, "temperature": 0.3}
    both = with_gradients(stepwise_info_nce, {**arguments, **options}, torch.ones(3))
    queries, docs = (
        arguments[name].requires_grad_(need) for name, need in zip(("query_steps", "doc_steps"), needed, strict=True)
    )
    losses = stepwise_info_nce(queries, docs, arguments["target"], **options)
    (grad,) = torch.autograd.grad(losses.sum(), queries if needed[0] else docs)
    torch.testing.assert_close(grad, both[1 if needed[0] else 2])


@BACKENDS
@pytest.mark.parametrize("masked", [False, True])
def test_statistics(backend: str, masked: bool) -> None:
    arguments = problem(11, 23, masked=masked)
    queries, docs = (l2_normalize(pool_steps(arguments[n])).transpose(0, 1) for n in ("query_steps", "doc_steps"))
    cosines = queries @ docs.transpose(1, 2)
    index = arguments["target"][None, :, None].expand(3, -1, 1)
    positive = cosines.gather(2, index)[..., 0]
    others = cosines.scatter(2, index, -torch.inf)
    if masked:
        others = others.masked_fill(arguments["mask"], -torch.inf)
    expected = InfoNCEStats((positive >= others.amax(2)).double().mean(1), positive.mean(1), others.amax(2).mean(1))
    given = {k: v.float() if k.endswith("steps") and backend == "triton" else v for k, v in arguments.items()}
    losses, stats = stepwise_info_nce(**given, return_stats=True, backend=backend)
    assert losses.shape == (3,)
    for got, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        assert not got.requires_grad


@BACKENDS
def test_edge_cases(backend: str) -> None:
    def run(queries: Tensor, docs: Tensor, **options: Any) -> tuple[Tensor, InfoNCEStats]:
        losses, stats = stepwise_info_nce(queries, docs, return_stats=True, backend=backend, **options)
        assert losses.isfinite().all()
        assert all(stat.isfinite().all() for stat in stats)
        return losses, stats

    row = torch.randn(1, 2, 8)
    losses, stats = run(row, row)  # one row, one candidate
    assert torch.equal(losses, torch.zeros(2))
    assert torch.equal(stats.hardest_negative, torch.full((2,), -1.0))
    assert torch.equal(stats.accuracy, torch.ones(2))
    # logits of -200, M = 65: log 65, not inf
    losses, _ = run(row, (-row).expand(65, 2, 8), temperature=0.005, target=torch.tensor([0]))
    torch.testing.assert_close(losses, torch.full((2,), 65.0).log(), rtol=1e-4, atol=1e-4)
    losses, stats = run(row.expand(5, 2, 8), row.expand(5, 2, 8))  # all equal, all duplicates
    torch.testing.assert_close(losses, torch.full((2,), 5.0).log(), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.accuracy, torch.ones(2))
    mask = ~torch.eye(5, dtype=torch.bool)
    losses, _ = run(row.expand(5, 2, 8), row.expand(5, 2, 8), mask=mask, include_queries=False, symmetric=True)
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-5)
    zero = torch.zeros(3, 2, 8, requires_grad=True)  # no direction: similarity 0 to everything
    losses, _ = run(zero, torch.randn(3, 2, 8))
    torch.testing.assert_close(losses, torch.full((2,), 3.0).log(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(losses.sum(), zero)
    assert torch.equal(grad, torch.zeros_like(zero))


def across(rank: int, sizes: tuple[tuple[int, int], ...], backend: str, budget: int) -> None:
    """This rank's part of one problem against all of it in one process; rank r has sizes[r] queries and documents."""
    info_nce_op.VECTOR_BYTES = budget
    starts = (
        [sum(s[0] for s in sizes[:r]) for r in range(len(sizes))],
        [sum(s[1] for s in sizes[:r]) for r in range(len(sizes))],
    )
    rows, docs = sum(s[0] for s in sizes), sum(s[1] for s in sizes)
    for masked, include_queries, symmetric in FLAGS:
        whole = problem(rows, docs, masked=masked, queries_masked=include_queries, seed=5)
        owner = [r for r, s in enumerate(sizes) for _ in range(s[0])]
        # every row's positive is among its own rank's documents
        local = torch.tensor([i % sizes[r][1] for i, r in enumerate(owner)])
        whole["target"] = local + torch.tensor([starts[1][r] for r in owner])
        if masked:
            whole["mask"][torch.arange(rows), whole["target"]] = False
        options = {"include_queries": include_queries, "symmetric": symmetric, "temperature": 0.3, "backend": backend}
        if backend == "triton":
            whole = {k: v.float() if k.endswith("steps") else v for k, v in whole.items()}
        mine = slice(starts[0][rank], starts[0][rank] + sizes[rank][0])
        my_docs = slice(starts[1][rank], starts[1][rank] + sizes[rank][1])
        part = {
            "query_steps": whole["query_steps"][mine],
            "doc_steps": whole["doc_steps"][my_docs],
            "target": local[mine],
            **({"mask": whole["mask"][mine]} if masked else {}),
        }
        upstream = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
        expected = with_gradients(stepwise_info_nce, {**whole, **options, "return_stats": True}, upstream)
        got = with_gradients(
            stepwise_info_nce, {**part, **options, "return_stats": True, "group": dist.group.WORLD}, upstream
        )
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if backend == "torch" else {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(got[0], expected[0], **tolerance)
        torch.testing.assert_close(got[1], expected[1][mine], **tolerance)
        torch.testing.assert_close(got[2], expected[2][my_docs], **tolerance)
        for one, other in zip(got[3], expected[3], strict=True):
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("sizes", [((5, 9),), ((5, 9), (3, 4)), ((2, 5), (1, 1), (4, 4), (3, 7))], ids=["1", "2", "4"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=HAS_TRITON)])
def test_ranks_with_uneven_batches_equal_one_process(sizes: Any, backend: str, tmp_path: Path) -> None:
    in_processes(len(sizes), across, tmp_path, sizes, backend, info_nce_op.VECTOR_BYTES)


@pytest.mark.parametrize("sizes", [((5, 9), (3, 4)), ((2, 5), (1, 1), (4, 4), (3, 7))], ids=["2", "4"])
def test_ranks_exchange_piece_by_piece(sizes: Any, tmp_path: Path) -> None:
    """Two candidates of each rank at a time; some ranks have none left while others do."""
    in_processes(len(sizes), across, tmp_path, sizes, "torch", 2 * len(sizes) * 6 * 8)


PEAK_SCRIPT = """
import resource, torch
from gircse.ops import stepwise_info_nce
torch.set_num_threads(2)
queries, docs = torch.randn(4096, 5, 64, requires_grad=True), torch.randn(8192, 5, 64, requires_grad=True)
stepwise_info_nce(torch.randn(8, 5, 64, requires_grad=True), torch.randn(16, 5, 64)).sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
stepwise_info_nce(queries, docs).sum().backward()
print(peak() - before)
"""


def test_memory_of_a_large_batch() -> None:
    """B = 4,096, M = 8,192, K = 5, D = 64: 128 MiB and the gradients; the similarities alone would be 640 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK_SCRIPT], capture_output=True, text=True, timeout=500, check=True)
    gradients = 4 * 5 * 64 * (4096 + 8192)
    assert int(done.stdout) <= (128 << 20) + gradients


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("detach_previous", [False, True])
def test_the_penalty_may_leave_the_earlier_step_alone(reduction: str, detach_previous: bool) -> None:
    losses = torch.tensor([1.0, 1.5, 1.2, 1.9], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"reduction": reduction, "detach_previous": detach_previous, "reg_weight": 0.7}
    ours, exact = icr_objective(losses, **options), icr_objective_reference(losses, **options)
    torch.testing.assert_close(ours, exact)
    (got,) = torch.autograd.grad(ours, losses)
    (want,) = torch.autograd.grad(exact, losses)
    torch.testing.assert_close(got, want)
    share = 0.25 if reduction == "mean" else 1.0
    assert (got[0] < share) != detach_previous  # L_1, which L_2 is worse than: pushed up, or left alone
