"""Every kernel in Triton's interpreter against the float64 definition, relative to eager PyTorch's own error."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from gircse_kernels import plan
from gircse_kernels.plan import FewRows, OneRow, Problem, TwoProducts
from gircse_kernels.soft_embed import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import ReduceOps

from gircse.ops import soft_embed, top_tokens
from gircse.ops.soft_embed_reference import soft_embed_reference, top_tokens_reference
from tests.kernels.small_plans import small_plans
from tests.ops.accuracy import DTYPES, OPTIONS, assert_as_accurate_as_eager, random_inputs, run, upstream_gradients

pytestmark = pytest.mark.usefixtures("interpreter")
TRITON = {"backend": "triton"}
# Only half precision is held in whole rows.
FORMS = pytest.mark.parametrize("whole_rows", [True, False], ids=["whole rows", "two products"])
NO_NAN_ROWS = pytest.mark.skipif(
    "nanargmax" in inspect.getsource(ReduceOps), reason="this Triton's interpreter, no GPU, refuses a row of NaN"
)
FORMS_AND_DTYPES = pytest.mark.parametrize(
    ("whole_rows", "dtype"),
    [(whole_rows, dtype) for whole_rows in (True, False) for dtype in DTYPES if not whole_rows or dtype.itemsize == 2],
    ids=str,
)


def check(whole_rows: bool, options: dict[str, Any] | None = None, *, seeds: int = 1, **shape: Any) -> None:
    """T = 37, V = 107, D = 27: three blocks of rows, seven tiles, two pieces of a row, the last of each ragged."""
    shape = {"leading": (37,), "vocab": 107, "width": 27, **shape}
    with small_plans(whole_rows):
        assert_as_accurate_as_eager(options={**(options or {}), **TRITON}, seeds=seeds, **shape)


def test_the_small_plans_have_several_of_everything() -> None:
    problem, device = Problem(37, 107, 27, 27, True, 2), device_of(torch.device("cpu"))
    with small_plans(True):
        few, one = (plan.plan_forward(problem._replace(rows=rows), device) for rows in (30, 1))
        assert isinstance(few, FewRows)
        assert isinstance(one, OneRow)
        assert few.row_blocks > 1
        for found in (few, one):
            assert found.splits > 1
            assert found.tiles_per_split > 1
            assert found.pieces > 1
            assert problem.width % found.config.blocks["PIECE"]
    with small_plans(False):
        found = plan.plan_forward(problem, device)
        assert isinstance(found, TwoProducts)
        assert problem.rows > found.row_block
        assert problem.vocab > found.chunk
        again = plan.plan_backward(problem, device, True, True)
        assert problem.rows > again.row_block
        assert problem.vocab > again.chunk


# One dtype of each form meets every option on its own; the others meet none, and all of them at once.
@pytest.mark.parametrize(
    ("whole_rows", "dtype", "name"),
    [
        (whole_rows, dtype, name)
        for whole_rows in (True, False)
        for dtype in (DTYPES[1:] if whole_rows else DTYPES[:2])
        for name in (OPTIONS if dtype == (torch.bfloat16 if whole_rows else torch.float32) else ("plain", "all"))
    ],
    ids=str,
)
def test_tied(whole_rows: bool, dtype: torch.dtype, name: str) -> None:
    options = OPTIONS[name]
    check(whole_rows, options, leading=(30,) if whole_rows else (37,), dtype=dtype)
    if whole_rows:  # one row has a kernel of its own
        check(True, options, leading=(1,), dtype=dtype, seeds=3)


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, OPTIONS["plain"]), *((dtype, OPTIONS["all"]) for dtype in DTYPES)], ids=str
)
def test_untied_with_bias(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(False, options, embed=35, bias=True, dtype=dtype)


@FORMS_AND_DTYPES
def test_temperature_per_row_and_bias(whole_rows: bool, dtype: torch.dtype) -> None:
    options = {"softcap": 3.0, "logit_scale": 1.3, "embed_scale": 2.0}
    check(whole_rows, options, leading=(3, 9), bias=True, row_temperature=True, dtype=dtype)


@FORMS
@pytest.mark.parametrize("width", [16, 24, 40, 48, 65])
def test_widths_of_several_pieces(whole_rows: bool, width: int) -> None:
    dtype = torch.bfloat16 if whole_rows else torch.float32
    check(whole_rows, leading=(7,), width=width, dtype=dtype, seeds=1)


@FORMS_AND_DTYPES
def test_nearly_one_hot(whole_rows: bool, dtype: torch.dtype) -> None:
    """Large logits: dS is a difference of nearly equal numbers, which a rounded saved output would spoil."""
    check(whole_rows, scale=12.0, leading=(19,), dtype=dtype, with_stats=False, seeds=2)


@FORMS_AND_DTYPES
def test_gumbel(whole_rows: bool, dtype: torch.dtype) -> None:
    options = {"gumbel_seed": torch.randint(-(2**62), 2**62, (19,)), "temperature": 0.7}
    check(whole_rows, options, leading=(19,), dtype=dtype)


@FORMS
def test_gumbel_of_one_seed(whole_rows: bool) -> None:
    dtype = torch.bfloat16 if whole_rows else torch.float32
    check(whole_rows, {"gumbel_seed": 7, "temperature": 0.7}, leading=(19,), dtype=dtype)


@FORMS
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_extreme_logits(whole_rows: bool, shift: float) -> None:
    dtype = torch.bfloat16 if whole_rows else torch.float32
    check(whole_rows, leading=(19,), bias=True, shift=shift, dtype=dtype, with_stats=False)


@FORMS
def test_entries_removed_by_a_bias_of_minus_infinity(whole_rows: bool) -> None:
    """Whole tiles and a whole split removed."""
    dtype = torch.bfloat16 if whole_rows else torch.float32
    tensors = random_inputs((19,), 107, 27, bias=True, dtype=dtype)
    kept = torch.zeros(107, dtype=torch.bool)
    kept[40:61] = True
    removed = {**tensors, "bias": tensors["bias"].masked_fill(~kept, -torch.inf)}
    with small_plans(whole_rows):
        ours = run(soft_embed, removed, dtype, True, TRITON)
    truth = run(soft_embed, removed, dtype, True, {"backend": "torch"})
    tolerance = 0.05 if whole_rows else 2e-5
    for name, exact in truth.items():
        assert (ours[name] - exact).abs().max() <= tolerance * (exact.abs().max() + 1), name
        if name in ("grad head_weight", "grad bias"):
            assert not ours[name][~kept].any()


@FORMS
@pytest.mark.parametrize("bad", [pytest.param(torch.nan, marks=NO_NAN_ROWS), torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_a_bad_row_stays_alone(whole_rows: bool, bad: float) -> None:
    dtype = torch.bfloat16 if whole_rows else torch.float32
    tensors = random_inputs((19,), 107, 27, dtype=dtype)
    with small_plans(whole_rows):
        clean = run(soft_embed, tensors, dtype, True, TRITON)
        tensors["hidden"][5, 3] = bad
        spoilt = run(soft_embed, tensors, dtype, True, TRITON)
    others = torch.arange(19) != 5
    for name in ("out", "lse", "entropy", "max_prob", "argmax", "grad hidden"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    assert spoilt["out"][5].isnan().all()
    assert 0 <= spoilt["argmax"][5] < 107


@FORMS
def test_argmax_takes_the_lowest_index_of_a_tie(whole_rows: bool) -> None:
    head = torch.ones(107, 4, dtype=torch.bfloat16)
    head[:18] = 0.0
    with small_plans(whole_rows):
        _, stats = soft_embed(torch.ones(6, 4, dtype=torch.bfloat16), head, return_stats=True, backend="triton")
    assert stats.argmax.tolist() == [18] * 6


@pytest.mark.parametrize("tied", [True, False])
def test_subsets_of_gradients(tied: bool) -> None:
    """A subset gives the gradients of the full set and nothing for the others."""
    tensors = random_inputs((21,), 40, 9, None if tied else 21, bias=True, row_temperature=True, dtype=torch.float32)
    options = {"softcap": 4.0, **TRITON}
    with small_plans(False):
        full = run(soft_embed, tensors, torch.float32, True, options)
        # one alone and all but one: each tensor's product is left out and taken by itself; tests/ops has every subset
        singles = [tuple(i == chosen for i in range(len(tensors))) for chosen in range(len(tensors))]
        for wanted in (*singles, *(tuple(not want for want in one) for one in singles)):
            leaves = {
                name: tensor.clone().requires_grad_(want)
                for want, (name, tensor) in zip(wanted, tensors.items(), strict=True)
            }
            out, stats = soft_embed(**leaves, **options, return_stats=True)  # type: ignore[misc, arg-type]
            targets = [out, stats.lse, stats.entropy]
            upstream = [g.to(t) for g, t in zip(upstream_gradients(out, stats), targets, strict=True)]
            torch.autograd.backward(targets, upstream)
            for want, (name, leaf) in zip(wanted, leaves.items(), strict=True):
                assert (leaf.grad is not None) == want, name
                if leaf.grad is not None:
                    # how the vocabulary is cut into chunks depends on what is asked for, and with it the rounding
                    torch.testing.assert_close(leaf.grad, full[f"grad {name}"], rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_only_one_of_out_lse_entropy_in_the_loss(target: int, tied: bool) -> None:
    tensors = random_inputs((21,), 75, 18, None if tied else 21, bias=True, row_temperature=True, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with small_plans(False):
        out, stats = soft_embed(**leaves, return_stats=True, backend="triton")  # type: ignore[misc, arg-type]
        wanted = (out, stats.lse, stats.entropy)[target]
        upstream = torch.randn(wanted.shape)
        ours = torch.autograd.grad(wanted, list(leaves.values()), upstream, allow_unused=True)
    out, stats = soft_embed_reference(**leaves)  # type: ignore[arg-type]
    truth = torch.autograd.grad(
        (out, stats.lse, stats.entropy)[target], list(leaves.values()), upstream, allow_unused=True
    )
    for name, got, exact in zip(leaves, ours, truth, strict=True):
        expected = torch.zeros_like(leaves[name]) if exact is None else exact
        torch.testing.assert_close(torch.zeros_like(expected) if got is None else got, expected, rtol=3e-5, atol=3e-5)


@FORMS
def test_two_runs_and_two_backwards_are_bitwise_equal(whole_rows: bool) -> None:
    tensors = random_inputs((19,), 107, 27, bias=True, row_temperature=True, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    with small_plans(whole_rows):
        results = []
        for _ in range(2):
            out, stats = soft_embed(**tensors, return_stats=True, backend="triton")  # type: ignore[misc, arg-type]
            targets = [out, stats.lse, stats.entropy]
            upstream = [g.to(t) for g, t in zip(upstream_gradients(out, stats), targets, strict=True)]
            results += [torch.autograd.grad(targets, leaves, upstream, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("leading", [(0,), (0, 3), (1,), (1, 1), ()])
def test_no_rows_and_one_row(leading: tuple[int, ...]) -> None:
    tensors = random_inputs(leading, 40, 9, embed=6, bias=True, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    out, stats = soft_embed(**tensors, return_stats=True, backend="triton")  # type: ignore[misc, arg-type]
    assert out.shape == (*leading, 6)
    assert all(stat.shape == leading for stat in stats[:4])
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    if out.numel() == 0:
        assert all(not grad.any() for grad in grads)
    else:
        torch.testing.assert_close(out, soft_embed_reference(**tensors)[0], rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 90),
    width=st.integers(1, 40),
    embed=st.none() | st.integers(1, 40),
    bias=st.booleans(),
    row_temperature=st.booleans(),
    whole_rows=st.booleans(),
    row_block=st.integers(1, 50),
    chunk_rows=st.integers(1, 90),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_any_shape_and_stride(
    rows: int,
    vocab: int,
    width: int,
    embed: int | None,
    bias: bool,
    row_temperature: bool,
    whole_rows: bool,
    row_block: int,
    chunk_rows: int,
    layout: str,
) -> None:
    tensors = random_inputs((rows,), vocab, width, embed, bias, row_temperature)
    dtype = torch.bfloat16 if whole_rows else torch.float32
    strided = {name: laid_out(tensor.to(dtype), layout) for name, tensor in tensors.items()}
    truth = run(soft_embed_reference, {n: t.double() for n, t in strided.items()}, torch.float64, True, {})
    with small_plans(whole_rows, row_block=row_block, chunk_rows=chunk_rows):
        leaves = {name: tensor.requires_grad_() for name, tensor in strided.items()}
        out, stats = soft_embed(**leaves, return_stats=True, backend="triton")  # type: ignore[misc, arg-type]
        targets = [out, stats.lse, stats.entropy]
        upstream = [g.to(t.dtype) for g, t in zip(upstream_gradients(out, stats), targets, strict=True)]
        if layout == "transposed":
            upstream[0] = laid_out(upstream[0], layout)
        grads = torch.autograd.grad(targets, list(leaves.values()), upstream)
    ours = {"out": out, "lse": stats.lse, "entropy": stats.entropy}
    ours.update({f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    for name, got in ours.items():
        scale = truth[name].abs().max().item() + 1
        tolerance = 2e-5 if dtype == torch.float32 or name in ("lse", "entropy") else 0.05
        assert (got.double() - truth[name]).abs().max().item() <= tolerance * scale, name


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded": one row's, or one number) in other strides."""
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.T.contiguous().T
    if layout == "strided":
        return torch.stack([tensor] * 3, -1)[..., 1]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), *((dtype, {"softcap": 3.0, "temperature": 0.6}) for dtype in DTYPES)],
    ids=str,
)
def test_top_tokens(dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = random_inputs((19,), 107, 27, bias=True, dtype=dtype)
    with small_plans(False):
        ids, probs = top_tokens(**tensors, n=9, **options, backend="triton")
    exact_ids, exact = top_tokens_reference(**{n: t.double() for n, t in tensors.items()}, n=9, **options)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-5, atol=1e-6)
    assert (ids == exact_ids).float().mean() > 0.95  # rounding may swap near ties


@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.float64, r"backend: 'triton' is not available: got dtype torch.float64")]
)
def test_what_the_kernels_cannot_take(dtype: torch.dtype, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        soft_embed(torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype), backend="triton")


@FORMS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
def test_int64_offsets(whole_rows: bool, transposed: bool, rows: int) -> None:
    """Elements further than 2^31 from the first: indices are multiplied by strides in 64 bits.

    The storage is reserved, not used: untouched pages cost nothing.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    vocab, width, stride = 40, 24, 2**27 + 8
    storage = torch.empty(vocab * stride, dtype=torch.bfloat16)
    head, hidden = (
        storage.as_strided((count, width), (1, stride) if transposed else (stride, 1), start)
        for count, start in ((vocab, 0), (rows, 512))
    )
    head.copy_(torch.randn(vocab, width))
    hidden.copy_(torch.randn(rows, width))
    with small_plans(whole_rows):
        out = soft_embed(hidden, head, backend="triton")
    expected, _ = soft_embed_reference(hidden.double(), head.double())
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)  # type: ignore[union-attr]
