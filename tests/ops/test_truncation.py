"""top_k, top_p and min_p against sorting in float64 and against transformers' own warpers; ties, gradients, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gircse.ops import kept_rows, selection, soft_embed, tiles_torch
from gircse.ops.chunk_scores import ordered_bits
from gircse.ops.soft_embed_reference import soft_embed_reference, truncation_reference
from tests.ops.accuracy import random_inputs, run
from tests.ops.test_soft_embed_memory import LargestTensor
from tests.ops.test_soft_embed_op import BACKENDS

RULES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "rows": {
        "top_k": torch.tensor([1, 2, 3, 20, 53, 10**9, 7, 1, 30, 5, 4]),
        "top_p": torch.linspace(0.05, 1.0, 11, dtype=torch.float64),
        "min_p": torch.linspace(0.0, 1.0, 11, dtype=torch.float64).flip(0) ** 4,
    },
}
ALL_RULES = pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "bias, softcap": {"bias": True, "softcap": 3.0, "temperature": 0.4},
    "untied, rows": {"embed": 6, "row_temperature": True, "logit_scale": 1.5},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several blocks of rows and chunks, the last of each ragged."""
    if not request.node.name.startswith("test_memory"):
        monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 16)
        monkeypatch.setattr(tiles_torch, "ROW_TILE", 4)
        monkeypatch.setattr(selection, "WORKSPACE_BYTES", 2 * 8 * 53 * 5)
        monkeypatch.setattr(selection, "_PART_BYTES", 8 * 53 * 3)
        monkeypatch.setattr(kept_rows, "_GATHERED_BYTES", 4 << 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distribution(scores: Tensor, **options: Any) -> Tensor:
    """The truncated probabilities themselves: with identity matrices the soft token is its distribution."""
    identity = torch.eye(scores.shape[-1], dtype=scores.dtype)
    out = soft_embed(scores, identity, **options)
    assert isinstance(out, Tensor)
    return out


@ALL_RULES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(rules: dict[str, Any], shape: dict[str, Any]) -> None:
    options = {name: value for name, value in shape.items() if name in ("softcap", "temperature", "logit_scale")}
    tensors = random_inputs(**{name: value for name, value in shape.items() if name not in options})
    options |= rules
    ours = run(soft_embed, tensors, torch.float64, True, options)
    truth = run(soft_embed_reference, tensors, torch.float64, True, options)
    for name, exact in truth.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-11, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@ALL_RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision_of_the_inputs(rules: dict[str, Any], dtype: torch.dtype) -> None:
    """What is kept follows the float32 scores, not ones that are rounded to the inputs' dtype."""
    tensors = random_inputs(bias=True, dtype=dtype)
    ours = run(soft_embed, tensors, dtype, True, rules)
    truth = run(soft_embed_reference, tensors, torch.float64, True, rules)
    for name, exact in truth.items():
        tolerance = 2e-5 if dtype == torch.float32 or name in ("lse", "entropy", "max_prob", "argmax") else 0.03
        error = (ours[name].double() - exact).abs().max()
        assert error <= tolerance * (exact.abs().max() + 1), name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 60),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    top_n=st.none() | st.integers(1, 30),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 10**6),
)
def test_the_kept_set_is_that_of_transformers(
    rows: int,
    vocab: int,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    top_n: int | None,
    spread: float,
    seed: int,
) -> None:
    """With the number of entries limited before the probabilities, by top_k, after them, by top_n, and both."""
    scores = spread * torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList()
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    if top_n is not None:
        warpers.append(TopKLogitsWarper(top_n))
    theirs = warpers(torch.zeros(rows, 1, dtype=torch.long), scores).softmax(-1)
    ours = distribution(scores, top_k=top_k, top_p=top_p, min_p=min_p, top_n=top_n)
    kept = truncation_reference(scores, top_k=top_k, top_p=top_p, min_p=min_p, top_n=top_n)
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.equal(kept, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_ties_stay_or_go_together() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -torch.inf]]).double().clamp_min(-1e30)
    assert (distribution(scores, top_k=2) > 0).tolist() == [[True, True, True, True, False, False]]
    # e^2 is 0.44 of the whole, each of the three 0.16
    assert (distribution(scores, top_p=0.5) > 0).tolist() == [[True, True, True, True, False, False]]
    assert (distribution(scores, top_p=0.4) > 0).tolist() == [[True, False, False, False, False, False]]
    assert (distribution(scores, min_p=0.36) > 0).tolist() == [[True, True, True, True, False, False]]
    assert (distribution(torch.ones(2, 5).double(), top_k=1) > 0).all()


@BACKENDS
def test_the_highest_score_survives_whatever_the_rounding(backend: str) -> None:
    """Rows whose two highest scores differ by less than two passes may disagree."""
    width, vocab = 16, 24
    head = torch.randn(vocab, width)
    head[1] = head[0] * (1 + 2**-22)
    hidden = head[0] * (1 + torch.rand(400 if backend == "torch" else 16, 1)) + 0.1 * torch.randn(1, width)
    hidden.requires_grad_()
    for rules in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        out, stats = soft_embed(hidden, head, return_stats=True, backend=backend, **rules)  # type: ignore[arg-type, misc]
        out.square().sum().backward()
        assert out.isfinite().all()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()
        assert (stats.max_prob > 0.49).all()


def test_nothing_to_remove() -> None:
    tensors = random_inputs(dtype=torch.float32)
    plain = soft_embed(**tensors)  # type: ignore[arg-type]
    for rules in ({"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 53}, {"top_k": 10**12}, {"top_p": 1.0, "min_p": 0.0}):
        torch.testing.assert_close(soft_embed(**tensors, **rules), plain)  # type: ignore[arg-type]


def test_entries_that_a_bias_removed_stay_removed() -> None:
    tensors = random_inputs(bias=True)
    tensors["bias"][10:] = -torch.inf
    ours = run(soft_embed, tensors, torch.float64, True, {"top_k": 30})
    truth = run(soft_embed, tensors, torch.float64, True, {})
    for name in ("out", "lse", "entropy", "argmax", "grad hidden"):
        torch.testing.assert_close(ours[name], truth[name])


def test_top_k_of_zero_is_no_limit() -> None:
    """As in transformers' generation; for single rows too."""
    tensors = random_inputs()
    plain = soft_embed(**tensors)  # type: ignore[arg-type]
    assert torch.equal(soft_embed(**tensors, top_k=0), plain)  # type: ignore[arg-type]
    k = torch.tensor([0, 3] * 5 + [0])
    mixed = soft_embed(**tensors, top_k=k)  # type: ignore[arg-type]
    assert torch.equal(mixed[k == 0], plain[k == 0])  # type: ignore[index]
    torch.testing.assert_close(mixed[k == 3], soft_embed(**tensors, top_k=3)[k == 3])  # type: ignore[arg-type, index]


@BACKENDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_a_bad_row_stays_alone(backend: str, bad: float) -> None:
    tensors = random_inputs(dtype=torch.float32)
    options = {**RULES["all"], "top_k": 9, "backend": backend}
    clean = run(soft_embed, tensors, torch.float32, True, options)
    tensors["hidden"][5, 3] = bad
    spoilt = run(soft_embed, tensors, torch.float32, True, options)
    others = torch.arange(11) != 5
    for name in ("out", "lse", "entropy", "max_prob", "argmax", "grad hidden"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    assert spoilt["out"][5].isnan().all()
    assert 0 <= spoilt["argmax"][5] < 53


def test_gradcheck() -> None:
    tensors = random_inputs((5,), vocab=21, width=4, embed=3, bias=True, row_temperature=True)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(names, values, strict=True))
        out, stats = soft_embed(**arguments, softcap=2.5, top_k=9, top_p=0.9, return_stats=True)
        return out, stats.lse, stats.entropy

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors.values()])


@BACKENDS
def test_compiled_transformed_faked(backend: str) -> None:
    torch._dynamo.reset()
    tensors = random_inputs(bias=True, dtype=torch.float32)
    hidden, rules = tensors["hidden"].requires_grad_(), dict(RULES["all"])

    def function(hidden: Tensor, p: Tensor) -> Any:
        return soft_embed(
            hidden, tensors["head_weight"], bias=tensors["bias"], top_k=9, top_p=p, gumbel_seed=5, backend=backend
        )

    compiled, p = torch.compile(function, fullgraph=True, backend="aot_eager"), torch.linspace(0.2, 1, 11)
    assert torch.equal(compiled(hidden, p), function(hidden, p))
    grads = [torch.autograd.grad(f(hidden, p).square().sum(), hidden)[0] for f in (function, compiled)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    batch = torch.randn(2, 11, 9)
    ours = torch.vmap(torch.func.grad(lambda h, q: function(h, q).square().sum()), (0, None))(batch, p)
    for one, each in zip(batch, ours, strict=True):
        leaf = one.requires_grad_()
        (exact,) = torch.autograd.grad(function(leaf, p).square().sum(), leaf)
        torch.testing.assert_close(each, exact, rtol=1e-5, atol=1e-6)
    if backend == "triton":  # the rest is the same for every backend
        return
    heads = torch.randn(2, 53, 9)
    batched = torch.vmap(lambda w: soft_embed(hidden.detach(), w, **rules))(heads)
    for head, got in zip(heads, batched, strict=True):
        torch.testing.assert_close(got, soft_embed(hidden.detach(), head, **rules))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = soft_embed(torch.randn(3, 4, 8), torch.randn(37, 8), top_p=torch.rand(3, 4))
        assert fake.shape == (3, 4, 8)  # type: ignore[union-attr]
    arguments = (*(tensors[n].detach() for n in ("hidden", "head_weight", "bias")), *[None] * 5, p, None, None)
    for capacity, stats in ((0, True), (64, False)):
        scalars = (1.0, 3.0, 1.0, 0, capacity, stats, None, backend)
        k = torch.full((11,), 20) if capacity else None
        torch.library.opcheck(
            torch.ops.gircse.soft_embed_selection.default, (*arguments[:7], k, *arguments[8:], *scalars)
        )


def test_autocast() -> None:
    tensors = random_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = soft_embed(**tensors, top_p=0.8)  # type: ignore[arg-type]
    plain = soft_embed(**{name: tensor.bfloat16() for name, tensor in tensors.items()}, top_p=0.8)  # type: ignore[arg-type]
    assert torch.equal(out, plain)  # type: ignore[arg-type]


def test_nothing_waits_for_values() -> None:
    """What would break the capture of a CUDA graph. Candidates are counted, on the CPU alone: with a top_k beyond them
    the CPU does what every device does."""

    class NoValues(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "masked_select")), name
            return func(*args, **(kwargs or {}))

    tensors = random_inputs(dtype=torch.float32)
    leaf = tensors["hidden"].requires_grad_()
    with NoValues():
        soft_embed(**tensors, top_k=500, top_p=0.9, min_p=0.1, top_n=300, hard=True, backend="torch").sum().backward()  # type: ignore[arg-type, union-attr]
    assert leaf.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_no_tensor_of_rows_times_vocabulary(dtype: torch.dtype) -> None:
    rows, vocab, width = 200, 50_000, 8
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, width, dtype=dtype)
    with LargestTensor([hidden, head]) as mode:
        soft_embed(hidden, head, top_p=0.9, backend="torch").float().square().sum().backward()  # type: ignore[union-attr]
    assert mode.largest <= tiles_torch.WORKSPACE_BYTES < 4 * rows * vocab


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": -2}, ValueError, r"top_k: got -2, expected at least 1, or 0 or -1 for no limit"),
        ({"top_k": 2.0}, TypeError, r"top_k: got float, expected an int or an integer tensor"),
        ({"top_k": True}, TypeError, r"top_k: got bool"),
        (
            {"top_k": torch.tensor([1, -3, 2])},
            ValueError,
            r"top_k: got -3, expected at least 1, or 0 or -1 for no limit",
        ),
        ({"top_k": torch.ones(3)}, TypeError, r"top_k: got dtype torch.float32, expected an integer one"),
        ({"top_k": torch.ones(2, dtype=torch.int64)}, ValueError, r"top_k: got shape \(2,\), expected one broadcast"),
        ({"top_p": 0.0}, ValueError, r"top_p: got 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, ValueError, r"top_p: got 1.5, expected above 0 and at most 1"),
        ({"top_p": "1"}, TypeError, r"top_p: got str, expected a number"),
        ({"top_p": torch.tensor([0.5, 0.5, float("nan")])}, ValueError, r"top_p: got nan"),
        ({"top_p": torch.ones(3, dtype=torch.int64)}, TypeError, r"top_p: got dtype torch.int64, expected a floating"),
        ({"min_p": -0.1}, ValueError, r"min_p: got -0.1, expected between 0 and 1"),
        ({"min_p": torch.tensor(2.0)}, ValueError, r"min_p: got 2.0, expected between 0 and 1"),
        ({"min_p": torch.ones(3, device="meta")}, ValueError, r"min_p: got device meta, expected cpu"),
        ({"hard": 1}, TypeError, r"hard: got int, expected a bool or a bool tensor"),
        ({"hard": torch.ones(3)}, TypeError, r"hard: got dtype torch.float32, expected torch.bool"),
        ({"hard": torch.ones(2, dtype=torch.bool)}, ValueError, r"hard: got shape \(2,\), expected one broadcast"),
        ({"gumbel_temperature": 0.5}, ValueError, r"gumbel_temperature: got one without gumbel_seed, expected both"),
        ({"gumbel_temperature": 0.0, "gumbel_seed": 1}, ValueError, r"gumbel_temperature: got 0.0, expected a finite"),
        ({"noise_scale": 0.5}, ValueError, r"noise_scale: got one without gumbel_seed, expected both"),
        (
            {"noise_scale": -1.0, "gumbel_seed": 1},
            ValueError,
            r"noise_scale: got -1.0, expected a number of at least 0",
        ),
        ({"top_n": 2.0}, TypeError, r"top_n: got float, expected an int or an integer tensor"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_embed(torch.randn(3, 4), torch.randn(5, 4), **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_order_like_the_numbers(dtype: torch.dtype) -> None:
    """What the search for a threshold bisects: neighbours of a number are neighbouring integers, -0 and 0 the same."""
    tiny = torch.finfo(dtype).smallest_normal
    some = torch.tensor([-torch.inf, -3.5, -1.0, -tiny, -0.0, 0.0, tiny, 1e-3, 1.0, 2.5, torch.inf], dtype=dtype)
    bits = ordered_bits(some)
    assert bits.dtype == (torch.int32 if dtype == torch.float32 else torch.int64)
    assert bits[4] == bits[5]
    assert (bits.diff()[[0, 1, 2, 3, 5, 6, 7, 8, 9]] > 0).all()
    inside = some[1:-1]
    above = torch.nextafter(inside, torch.full_like(inside, torch.inf))
    assert (ordered_bits(above) - ordered_bits(inside) == 1).all()
