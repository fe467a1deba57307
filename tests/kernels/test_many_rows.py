"""Form 3 and the backward in each of their ways: half scores, our own product, P kept, 3xTF32; and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gircse_kernels import launching, plan
from gircse_kernels.contract import Inputs, Options
from gircse_kernels.plan import Device, Problem
from gircse_kernels.soft_embed import launch_many_rows

from bench.static.launches import DEVICES, Call, record
from gircse.ops import soft_embed
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.kernels.small_plans import small_plans
from tests.ops.accuracy import assert_as_accurate_as_eager, random_inputs, rms

H100 = DEVICES[90]
INTERPRETER = pytest.mark.usefixtures("interpreter")
KEPT = {"kept": 1 << 20, "row_block": 64, "chunk_rows": 256}
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "half scores": (torch.bfloat16, {"half_scores": True, "chunk_rows": 32}),
    "our product": (torch.bfloat16, {"epilogue": True}),
    "our product, float16": (torch.float16, {"epilogue": True}),
    "P kept": (torch.bfloat16, {"half_scores": True, **KEPT}),
    "P kept, float32 scores": (torch.float16, KEPT),
    "P kept, float32": (torch.float32, KEPT),
}


@INTERPRETER
@pytest.mark.parametrize(
    ("way", "embed"),
    [
        *((way, None) for way in WAYS),
        *((way, 35) for way in WAYS if way not in ("our product, float16", "P kept, float32 scores")),
    ],
)  # the two left out differ from another untied one by their dtype alone
def test_as_accurate_as_eager(way: str, embed: int | None) -> None:
    """Without statistics, for which scores would stay float32."""
    dtype, choices = WAYS[way]
    options = {"temperature": 0.7, "logit_scale": 1.3, "embed_scale": 2.0}
    tensors = random_inputs((37,), 107, 40, embed, bias=True)
    upstream = torch.randn(37, embed or 40, dtype=torch.float64).bfloat16()

    def results(function: Any, wide: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.to(dtype).to(wide).requires_grad_() for name, tensor in tensors.items()}
        out = function(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(wide))
        return {"out": out.double(), **{name: grad.double() for name, grad in zip(leaves, grads, strict=True)}}

    with small_plans(False, **choices):
        ours = results(lambda **leaves: soft_embed(**leaves, **options, backend="triton"), dtype)
    eager = results(lambda **leaves: soft_embed_reference(**leaves, **options)[0], dtype)
    for name, exact in results(lambda **leaves: soft_embed_reference(**leaves, **options)[0], torch.float64).items():
        allowed = 2 * rms([eager[name] - exact]) + torch.finfo(dtype).eps * rms([exact])
        assert rms([ours[name] - exact]) <= allowed, name


@INTERPRETER
@pytest.mark.parametrize("choices", [{}, {"epilogue": True}], ids=["elementwise", "our product"])
def test_statistics_of_our_product_and_of_cublas(choices: dict[str, Any]) -> None:
    with small_plans(False, **choices):
        assert_as_accurate_as_eager(
            True, {"backend": "triton"}, leading=(21,), vocab=107, width=40, dtype=torch.bfloat16, seeds=1
        )


@INTERPRETER
@pytest.mark.parametrize("order", ["rising", "falling", "rising late"])
def test_rows_that_outgrow_their_reference(order: str) -> None:
    """The peak rises by far more than 8 from tile to tile and chunk to chunk, up to overflow of a fixed reference."""
    rows, vocab = 21, 107
    steps = torch.arange(vocab, dtype=torch.float64) * 3.0
    scores = {"rising": steps, "falling": steps.flip(0), "rising late": torch.where(steps > 250, steps, 0.0)}[order]
    shifts = torch.linspace(-400, 400, rows, dtype=torch.float64)[:, None]
    hidden = torch.cat([torch.ones(rows, 1), shifts, torch.randn(rows, 8)], 1).float()
    head = torch.cat([scores[:, None], torch.ones(vocab, 1), torch.randn(vocab, 8)], 1).float()
    upstream = torch.randn(rows, 10)

    def results(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        out, stats = function(leaf, head.to(dtype))
        (grad,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return [t.detach().double() for t in (out, *stats[:4], grad)]

    with small_plans(False):
        ours = results(lambda *a: soft_embed(*a, return_stats=True, backend="triton"), torch.float32)
    eager, truth = (results(soft_embed_reference, dtype) for dtype in (torch.float32, torch.float64))
    for got, plain, exact in zip(ours, eager, truth, strict=True):
        assert rms([got - exact]) <= 2 * rms([plain - exact]) + 1e-6 * rms([exact])


@INTERPRETER
@pytest.mark.parametrize("kept", [True, False], ids=["P kept", "recomputed"])
def test_gradients_of_confident_rows(kept: bool) -> None:
    """Nearly one-hot rows, whose gradients are differences of nearly equal numbers: dP is not rounded before."""
    hidden = 60 * torch.randn(31, 16, dtype=torch.float64)
    head, upstream = torch.randn(31, 16, dtype=torch.float64), torch.randn(31, 16, dtype=torch.float64)

    def gradients(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (hidden, head)]
        grads = torch.autograd.grad(function(*leaves), leaves, upstream.bfloat16().to(dtype))
        return [grad.double() for grad in grads]

    with small_plans(False, half_scores=True, **(KEPT if kept else {"chunk_rows": 32})):
        ours = gradients(lambda *a: soft_embed(*a, backend="triton"), torch.bfloat16)
    eager = gradients(lambda h, w: torch.softmax(h @ w.T, -1) @ w, torch.bfloat16)
    truth = gradients(lambda h, w: torch.softmax(h @ w.T, -1) @ w, torch.float64)
    for got, plain, exact in zip(ours, eager, truth, strict=True):
        assert rms([got - exact]) <= 2 * rms([plain - exact]) + 1e-5


@INTERPRETER
def test_two_backwards_on_kept_probabilities_are_bitwise_equal() -> None:
    tensors = random_inputs((21,), 107, 40, bias=True, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    with small_plans(False, half_scores=True, **KEPT):
        out = soft_embed(**tensors, backend="triton")  # type: ignore[arg-type]
        kept = [t for t in out.grad_fn.saved_tensors if t is not None and t.shape == (21, 107)]  # type: ignore[union-attr]
        assert len(kept) == 1
        upstream = torch.randn_like(out)
        first, second = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def products(call: Call) -> list[tuple[int, int, int]]:
    """M, N, K of each product of cuBLAS."""
    return [tuple(product[:3]) for product in record(call, H100).products]


def test_kept_probabilities_save_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab, width = 64, 32000, 96
    call = Call("soft_embed", (rows, vocab, width, width), "bfloat16", False, True)
    forward = [(rows, vocab, width), (rows, width, vocab)]
    assert products(call) == [*forward, (rows, vocab, width), (rows, width, vocab)]
    monkeypatch.setattr(plan, "KEPT_BYTES", 0)
    assert products(call) == [*forward, (rows, vocab, width), (rows, vocab, width), (rows, width, vocab)]


def test_a_tied_matrix_is_read_once_for_scores_and_probability_gradients() -> None:
    rows, vocab, width = 2048, 5000, 96
    call = Call("soft_embed", (rows, vocab, width, width), "bfloat16", True, True, ("statistics", "matrices"))
    found = products(call)
    assert sum(n for m, n, k in found if m == 2 * rows and k == width) == vocab
    assert sum(m for m, n, k in found if n == width and k == 2 * rows) == vocab


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("variants", [(), ("statistics",), ("threshold",)])
def test_scores_are_rounded_only_where_nobody_reads_them(dtype: str, variants: tuple[str, ...]) -> None:
    call = Call("soft_embed", (300, 5000, 96, 96), dtype, False, False, variants)
    weights = next(x for x in record(call, H100).launches if x.name == "weights_kernel")
    rounded = dtype == "bfloat16" and not variants
    assert weights.arguments[0].dtype == (torch.bfloat16 if rounded else torch.float32)
    products, probs = (tensor.untyped_storage()._cdata for tensor in weights.arguments[:2])
    assert (products == probs) == (rounded or dtype == "float32")  # P takes their place


@pytest.mark.parametrize("variants", [(), ("statistics",), ("noise",), ("threshold",), ("scores",)])
@pytest.mark.parametrize("aligned", [True, False])
def test_our_product_where_its_operands_and_options_allow_it(
    monkeypatch: pytest.MonkeyPatch, variants: tuple[str, ...], aligned: bool
) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: plan.Choice(True, True, 64, 64))
    plan.plan_two_products.cache_clear()
    try:
        call = Call("soft_embed", (300, 5000, 96 if aligned else 97, 40), "bfloat16", False, False, variants)
        names = [x.name for x in record(call, H100).launches]
    finally:
        plan.plan_two_products.cache_clear()
    expected = aligned and variants in ((), ("statistics",))
    assert ("weights_product_kernel" in names) == expected
    assert ("weights_kernel" in names) != expected


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32_allowed")
def test_no_float32_product_goes_to_cublas_where_it_may_round_to_tf32() -> None:
    call = Call("soft_embed", (300, 5000, 96, 40), "float32", False, True, ("matrices",))
    started: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mm", "addmm"):
            patch.setattr(torch, name, lambda *_, name=name, **__: started.append(name))
        patch.setattr(launching, "launch", lambda kernel, *_, **__: started.append(kernel.__name__))
        a, b, out = (torch.empty(n, device="meta") for n in ((9, 5), (5, 7), (9, 7)))
        launching.product(a, b, out)
    assert started == ["product_kernel"]
    assert all(p.itemsize == 4 for p in record(call, H100).products)  # all of them go through `launching.product`


@INTERPRETER
@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize("add", [False, True])
def test_our_float32_product(add: bool) -> None:
    """Several tiles, ragged in every dimension, any strides."""
    a, b = torch.randn(37, 43), torch.randn(43, 29)
    with small_plans(False):
        for left in (a, a.T.contiguous().T):
            for right in (b, b.T.contiguous().T):
                out = torch.ones(29, 37).T if add else torch.full((37, 29), torch.nan)
                launching.product(left, right, out, add=add)
                exact = a.double() @ b.double() + add
                assert (out - exact).abs().max() <= 4 * ((a @ b + add) - exact).abs().max() + 1e-6


PROBLEMS = [
    Problem(rows, vocab, width, width, tied, itemsize)
    for rows in (1, 33, 64, 220, 221, 1024, 4096, 65536)
    for vocab, width, tied in ((49152, 576, True), (50257, 768, True), (151936, 896, True), (32000, 4096, False))
    for itemsize in (2, 4)
]


@pytest.mark.parametrize("exact_scores", [False, True])
def test_chunks_stay_within_the_budget(exact_scores: bool) -> None:
    for problem in PROBLEMS:
        for budget in (64 << 20, 24 << 20):
            form = plan.plan_two_products(problem, H100, exact_scores=exact_scores, scratch=budget)
            accumulator = 4 * form.row_block * problem.value_width
            assert form.scratch(problem) <= budget * 1.02 + accumulator, problem
            back = plan.plan_backward(problem, H100, True, True, exact_scores=exact_scores, scratch=budget)
            rows = 2 * back.row_block * problem.width * problem.itemsize + 4 * problem.rows
            assert back.scratch(problem) <= budget + rows, problem
            assert back.row_block <= plan.ROW_BLOCK


def test_what_is_kept() -> None:
    """P of at most the budget, in one chunk, of one block of rows."""
    budget = 64 << 20
    for problem in PROBLEMS:
        form = plan.plan_two_products(problem, H100, kept=budget)
        size = problem.rows * plan.padded(problem.vocab) * problem.itemsize
        assert form.keep == (size <= budget and problem.rows <= plan.ROW_BLOCK), problem
        assert not form.keep or form.chunk >= problem.vocab
        assert not plan.plan_two_products(problem, H100, kept=0).keep
    narrow = Problem(5000, 1000, 64, 64, True, 2)
    assert not plan.plan_two_products(narrow, H100, kept=budget).keep


def test_the_fewest_launches() -> None:
    """Many rows of a short vocabulary: one chunk."""
    found = record(Call("soft_embed", (1024, 8000, 96, 96), "bfloat16", True), H100)
    assert [x.name for x in found.launches] == ["weights_kernel", "settle_kernel", "finish_kernel"]
    assert len(found.products) == 2


def test_old_gpus_have_no_tensor_descriptors() -> None:
    problem = Problem(1024, 50000, 896, 896, True, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose", lambda *_: plan.Choice(True, True, 64, 64))
        plan.plan_two_products.cache_clear()
        assert plan.plan_two_products(problem, Device(80, 108), epilogue=True).product is None
        assert plan.plan_two_products(problem, Device(90, 132), epilogue=True).product is not None
    plan.plan_two_products.cache_clear()


def test_descriptors_get_no_rows_that_share_memory() -> None:
    """A GPU's tensor maps have strides of at least a row; cuBLAS gets a copy of such a matrix."""
    hidden, head = torch.zeros(1, 64).bfloat16(), torch.zeros(96, 64).bfloat16()
    assert launch_many_rows._fits_epilogue(Inputs(hidden.expand(1, 64), head), Options())
    assert not launch_many_rows._fits_epilogue(Inputs(hidden.expand(40, 64), head), Options())


@INTERPRETER
@pytest.mark.parametrize("way", ["our product, float16", "P kept, float32 scores"])
def test_a_row_of_one_probability_is_its_embedding(way: str) -> None:
    """As in eager PyTorch, whose probability of 1 needs no rounding. (The interpreter truncates to bfloat16.)"""
    dtype, choices = WAYS[way]
    tensors = [tensor.to(dtype) for tensor in random_inputs((37,), 107, 40, 35, scale=400.0).values()]
    highest, index = (tensors[0].double() @ tensors[1].double().T).topk(2)
    certain = highest[:, 0] - highest[:, 1] > highest[:, 0] / 16 + 40.0  # however the scores are rounded
    with small_plans(False, **choices):
        out = soft_embed(*tensors, backend="triton")
    assert certain.sum() > 15
    torch.testing.assert_close(out[certain], tensors[2][index[certain, 0]], rtol=0.0, atol=0.0)
