"""Soft tokens of given logits: every option, layout and transform that the ones of hidden states have."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import soft_embed, soft_embed_logits
from gircse.ops.noise import gumbel
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.kernels.small_plans import small_plans
from tests.ops import test_row_options as row_options
from tests.ops.accuracy import rms
from tests.ops.test_row_options import ROWS, VOCAB, small_tiles  # noqa: F401  a fixture
from tests.ops.test_soft_embed_memory import LargestTensor
from tests.ops.test_soft_embed_op import BACKENDS

HARD = torch.arange(ROWS) % 2 == 0
OPTIONS: dict[str, dict[str, Any]] = {
    **row_options.CASES,
    "plain": {},
    "hard": {"hard": HARD, "top_k": 9, "gumbel_seed": 2, "temperature": row_options.TEMPERATURES},
    "bias": {"bias": torch.randn(VOCAB, dtype=torch.float64), "min_p": 0.1, "hard": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_equals_soft_embed_with_a_head_that_is_the_identity(case: str) -> None:
    """Values, statistics and the gradients of logits, embedding matrix and options, in float64."""
    matrix, identity = torch.randn(VOCAB, 7, dtype=torch.float64), torch.eye(VOCAB, dtype=torch.float64)
    logits = 3 * torch.randn(ROWS, VOCAB, dtype=torch.float64)
    logits[2, 5:9] = logits[2].max()
    if "softcap" not in OPTIONS[case]:  # which makes a finite number of an infinite one
        logits[1, ::2] = -torch.inf
    results = []
    for given in (True, False):
        options = row_options.leaves(**OPTIONS[case])
        if not given:  # the product of an infinite logit and the identity is not a number
            banned = torch.zeros(ROWS, VOCAB, dtype=torch.float64).masked_fill_(logits.isinf(), -torch.inf)
            options["values"] = torch.cat([options.get("values", banned[:, :0]), banned], 1)
            every = torch.arange(VOCAB).expand(ROWS, VOCAB)
            options["ids"] = torch.cat([options.get("ids", every[:, :0]), every], 1)
        if "ids" in options:
            options["logit_bias"] = options.pop("ids"), options.pop("values")
        leaves = [t.clone().requires_grad_() for t in (logits if given else logits.nan_to_num(neginf=0.0), matrix)]
        call = soft_embed_logits if given else lambda x, e, **o: soft_embed(x, identity, e, **o)
        out, stats = call(*leaves, **options, return_stats=True)  # type: ignore[operator]
        torch.manual_seed(0)
        upstream = [torch.randn_like(t) for t in (out, stats.lse, stats.entropy)]
        grads = torch.autograd.grad((out, stats.lse, stats.entropy), leaves, upstream)
        results.append([out, *stats, *grads])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


LAYOUTS = {
    "rows": lambda t: t,
    "rows with gaps": lambda t: torch.cat([t, t], -1)[:, :VOCAB],
    "columns": lambda t: t.T.contiguous().T,
    "not one stride": lambda t: torch.cat([t.unflatten(0, (3, -1)), torch.zeros(3, 1, VOCAB).to(t)], 1)[:, :-1],
}


@BACKENDS
@pytest.mark.parametrize(
    ("dtypes", "layout", "case"),
    [
        ((torch.float32, torch.float32), "rows", "all"),
        ((torch.float32, torch.bfloat16), "rows with gaps", "min-p"),
        ((torch.bfloat16, torch.bfloat16), "columns", "plain"),
        ((torch.bfloat16, torch.float32), "not one stride", "noise"),
        ((torch.float16, torch.float16), "not one stride", "all"),
    ],
    ids=str,
)
def test_as_accurate_as_eager(backend: str, dtypes: tuple[torch.dtype, ...], layout: str, case: str) -> None:
    """Against float64, in several chunks and blocks of rows, all ragged; logits are read where they lie."""
    options: dict[str, Any] = {
        "plain": {"temperature": 0.7},
        "noise": {"gumbel_seed": torch.arange(21), "embed_scale": 2.0, "hard": torch.arange(21) % 2 == 0},
        "min-p": {"min_p": 0.02, "hard": torch.arange(21) % 2 == 0},
        "all": {"softcap": 4.0, "logit_scale": 1.5, "temperature": torch.rand(21) + 0.5},
    }[case]
    torch.manual_seed(0)
    logits, matrix, bias = (torch.randn(*shape).bfloat16() for shape in ((21, VOCAB), (VOCAB, 13), (VOCAB,)))
    logits[3, 1:] = -torch.inf
    upstream = torch.randn(21, 13).bfloat16()
    reference_options = {n: v for n, v in options.items() if n != "gumbel_seed"}
    if "gumbel_seed" in options:
        reference_options["noise"] = gumbel(options["gumbel_seed"], 0, VOCAB)

    def results(function: Any, wide: tuple[torch.dtype, ...], **options: Any) -> list[Tensor]:
        leaves = [t.to(d).detach() for t, d in zip((logits, matrix, bias), (*wide, wide[1]), strict=True)]
        leaves[0] = LAYOUTS[layout](leaves[0])
        for leaf in leaves:
            leaf.requires_grad_()
        before = leaves[0].detach().clone()
        leading = leaves[0].shape[:-1]
        options = {n: v.reshape(leading) if getattr(v, "shape", ()) == (21,) else v for n, v in options.items()}
        out, stats = function(leaves[0], leaves[1], bias=leaves[2], **options)
        assert function is not ours or out.dtype == wide[1]
        row = torch.linspace(-1, 1, 21).reshape(leading)
        given = upstream.to(out).reshape(out.shape), row.to(stats.lse), row.to(stats.entropy)
        grads = torch.autograd.grad((out, stats.lse, stats.entropy), leaves, given)
        assert torch.equal(before, leaves[0])
        assert [g.dtype for g in grads] == [t.dtype for t in leaves]
        return [t.double().reshape(-1, t.shape[-1] if t.dim() > len(leading) else 1) for t in (out, *stats[:3], *grads)]

    def ours(*tensors: Tensor, **options: Any) -> Any:
        return soft_embed_logits(*tensors, **options, return_stats=True, backend=backend)

    def reference(logits: Tensor, matrix: Tensor, **options: Any) -> Any:
        options = {
            n: v.to(matrix.dtype) if getattr(v, "dtype", None) == torch.float32 else v for n, v in options.items()
        }
        return soft_embed_reference(logits.to(matrix.dtype), None, matrix, **options)

    with small_plans(False, row_block=8) if backend == "triton" else nullcontext():
        got = results(ours, dtypes, **options)
    if "noise" in reference_options and layout == "not one stride":
        reference_options["noise"] = reference_options["noise"].reshape(3, 7, VOCAB)
    plain, exact = (results(reference, d, **reference_options) for d in (dtypes, (torch.float64, torch.float64)))
    for i, (mine, theirs, truth) in enumerate(zip(got, plain, exact, strict=True)):
        # kernels sum the bias' gradient from that of the logits, in its dtype
        kinds = {0: dtypes[1:], 4: dtypes[:1], 5: dtypes[1:], 6: dtypes}.get(i, (torch.float32,))
        rounding = max(torch.finfo(dtype).eps for dtype in kinds)
        allowed = 2 * rms([theirs - truth]) + rounding * rms([truth]) + 1e-6
        assert rms([mine - truth]) <= allowed, f"{i}: {rms([mine - truth])} > {allowed}"


@BACKENDS
def test_a_row_with_everything_banned_is_not_a_number_and_alone(backend: str) -> None:
    logits, matrix = torch.randn(4, 37), torch.randn(37, 5)
    logits[2] = -torch.inf
    for options in ({}, {"top_k": 3}, {"hard": True}):
        out = soft_embed_logits(logits, matrix, **options, backend=backend)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        assert out.isnan().any(1).tolist() == [False, False, True, False]
        assert out.isnan().all(1)[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_the_logits_and_their_gradient(dtype: torch.dtype) -> None:
    """No other tensor of [T, V], not even where rows have no common stride; the logits themselves are kept."""
    whole, matrix = torch.randn(3, 17, 400, dtype=dtype), torch.randn(400, 8, dtype=dtype, requires_grad=True)
    for logits in (whole, whole[:, 1:]):
        leaf = logits.detach().requires_grad_()
        with LargestTensor([whole, matrix]) as mode:
            out, stats = soft_embed_logits(leaf, matrix, temperature=0.7, return_stats=True, backend="torch")
        assert mode.largest < leaf.numel() * dtype.itemsize
        assert leaf.data_ptr() in [
            t.data_ptr() for t in stats.lse.grad_fn.next_functions[0][0].saved_tensors if t is not None
        ]
        gradient = LargestTensor([whole, matrix])
        with gradient:
            (out.float().square().sum() + stats.lse.sum()).backward()
        assert gradient.largest == leaf.numel() * dtype.itemsize


COMPILE = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


def energy(logits: Tensor, matrix: Tensor, **options: Any) -> Tensor:
    return soft_embed_logits(logits, matrix, temperature=0.8, **options).square().sum()  # type: ignore[union-attr]


@BACKENDS
def test_compiled_and_transformed(backend: str) -> None:
    torch._dynamo.reset()
    logits, matrix = torch.randn(3, 5, 37), torch.randn(37, 6)
    plain = lambda x, e: (torch.softmax(x / 0.8, -1) @ e).square().sum()  # noqa: E731
    for view, compiled in ((lambda x: x, lambda f: f), (lambda x: x[:, :-1], COMPILE)):
        function = lambda x, e, view=view: energy(view(x), e, backend=backend)  # noqa: E731
        wanted = torch.func.grad(lambda x, e, view=view: plain(view(x), e), (0, 1))(logits, matrix)
        leaves = [t.clone().requires_grad_() for t in (logits, matrix)]
        mapped = torch.vmap(torch.func.grad(function), (1, None), 1)(logits.unsqueeze(1), matrix)
        for got in (
            torch.autograd.grad(compiled(function)(*leaves), leaves),
            torch.func.grad(function, (0, 1))(logits, matrix),
        ):
            for mine, exact in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mapped[:, 0], wanted[0], rtol=1e-4, atol=1e-5)


def test_second_derivatives() -> None:
    """Also of several blocks of rows whose logits have no common stride."""
    logits, matrix = torch.randn(3, 4, 11, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    options: dict[str, Any] = {"top_k": 6, "gumbel_seed": 3, "hard": torch.tensor([True, False, True])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gircse.ops.soft_embed_plain.PLAIN_BYTES", 3 * 11 * 8)
        leaves = [t.requires_grad_() for t in (logits, matrix)]
        call = lambda x, e: soft_embed_logits(x[:, :-1], e, return_stats=True)[0]  # noqa: E731
        assert torch.autograd.gradgradcheck(call, leaves)
    mine, exact = (
        torch.autograd.functional.hessian(lambda x, f=function: f(x).square().sum(), logits[:, 0].detach())
        for function in (
            lambda x: soft_embed_logits(x, matrix.detach(), **options),
            lambda x: soft_embed_reference(
                x, None, matrix.detach(), top_k=6, noise=gumbel(torch.full((3,), 3), 0, 11), hard=options["hard"]
            )[0],
        )
    )
    torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-6)


def test_autocast_casts_the_embedding_matrix_alone() -> None:
    logits, matrix = torch.randn(5, 37, requires_grad=True), torch.randn(37, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = soft_embed_logits(logits, matrix)
    assert isinstance(out, Tensor)
    assert torch.equal(out, soft_embed_logits(logits, matrix.bfloat16()))  # type: ignore[arg-type]
    grads = torch.autograd.grad(out.sum(), (logits, matrix))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("logits", "matrix", "error", "message"),
    [
        (torch.ones(3, 5), torch.ones(4, 2), ValueError, r"embed_weight: got shape \(4, 2\), expected \[5, E\]"),
        (torch.ones(()), torch.ones(4, 2), ValueError, r"logits: got shape \(\), expected \[..., V\]"),
        (torch.ones(3, 4).int(), torch.ones(4, 2), TypeError, r"logits: got dtype torch.int32"),
        (torch.ones(3, 4).double(), torch.ones(4, 2), TypeError, r"embed_weight: got dtype torch.float32, expected"),
        ([[1.0]], torch.ones(1, 2), TypeError, r"logits: got list, expected a torch.Tensor"),
    ],
)
def test_errors(logits: Any, matrix: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_embed_logits(logits, matrix)


@pytest.mark.parametrize("rules", [{"top_k": 5, "hard": True}, {"top_p": 0.8}], ids=str)
def test_rules_of_rows_without_a_common_stride(rules: dict[str, Any]) -> None:
    whole, matrix = torch.randn(2, 4, 70), torch.randn(70, 5)
    results = []
    for logits in (whole[:, 1:], whole[:, 1:].contiguous()):
        leaf = logits.detach().requires_grad_()
        out, stats = soft_embed_logits(leaf, matrix, return_stats=True, **rules)
        results.append([out, *stats[:4], *stats.full, *torch.autograd.grad(out.square().sum() + stats.lse.sum(), leaf)])
    assert all(map(torch.equal, *results))


@BACKENDS
def test_gradients_that_nobody_asks_for_change_nothing(backend: str) -> None:
    """Of bfloat16 tensors, each alone: dS is the logits' gradient, or has a place of its own, or there is none."""
    tensors = torch.randn(5, 37).bfloat16(), torch.randn(37, 6).bfloat16(), torch.rand(5) + 0.5
    upstream = torch.randn(5, 6).bfloat16()

    def gradients(wanted: tuple[bool, ...]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        out = soft_embed_logits(leaves[0], leaves[1], temperature=leaves[2], backend=backend)
        return list(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], upstream))  # type: ignore[arg-type]

    together = gradients((True, True, True))
    for i, every in enumerate(together):
        (alone,) = gradients(tuple(j == i for j in range(3)))
        assert torch.equal(alone, every)
