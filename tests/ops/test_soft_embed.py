"""soft_embed against its float64 definition, relative to the error of eager PyTorch in the same dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gircse.ops import scorer, soft_embed, soft_embed_torch, tiles_torch
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops import accuracy
from tests.ops.accuracy import (
    DTYPES,
    OPTIONS,
    assert_as_accurate_as_eager,
    random_inputs,
    rms,
    rounding_unit,
    run,
    upstream_gradients,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and tiles, the last of each ragged, at the shapes of these tests."""
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 16)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes this small gain nothing from threads, and on a busy machine each parallel loop waits for a time slice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("embed", "bias"), [(None, False), (None, True), (9, False), (14, True)])
def test_accuracy(dtype: torch.dtype, options: dict[str, Any], embed: int | None, bias: bool) -> None:
    assert_as_accurate_as_eager(options=options, embed=embed, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_accuracy_temperature_per_row(dtype: torch.dtype, softcap: float | None) -> None:
    options = {"softcap": softcap, "logit_scale": 1.3, "embed_scale": 2.0}
    shape = {"leading": (3, 5), "embed": 6, "bias": True, "row_temperature": True, "dtype": dtype}
    assert_as_accurate_as_eager(options=options, **shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("embed", [None, 7])
def test_accuracy_nearly_one_hot(dtype: torch.dtype, embed: int | None) -> None:
    """Large logits: dS is a difference of nearly equal numbers, which a rounded saved output would spoil."""
    assert_as_accurate_as_eager(with_stats=False, scale=12.0, embed=embed, dtype=dtype)


WIDE: dict[str, Any] = {"vocab": 3011, "width": 256, "scale": 3 / 16, "dtype": torch.float32}


def test_accuracy_of_one_row() -> None:
    assert_as_accurate_as_eager(leading=(1,), **WIDE)


def test_statistics_of_one_row_at_a_time() -> None:
    """Where eager PyTorch happens to be right by luck, ours need not be: the bound is that of the arithmetic."""
    for seed in range(60):
        tensors = random_inputs((1,), seed=seed, **WIDE)
        _, ours = soft_embed(**tensors, return_stats=True)  # type: ignore[misc, arg-type]
        _, eager = soft_embed_reference(**tensors)
        _, truth = soft_embed_reference(**{name: tensor.double() for name, tensor in tensors.items()})
        exact = {name: [value] for name, value in truth._asdict().items()}
        for name in ("lse", "entropy", "max_prob"):
            errors = [rms([getattr(found, name) - getattr(truth, name)]) for found in (ours, eager)]
            assert errors[0] <= 2 * errors[1] + rounding_unit(name, exact, torch.float32), (name, seed)


@pytest.mark.parametrize("statistic", ["lse", "entropy", "max_prob"])
def test_a_statistic_that_is_a_little_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch, statistic: str) -> None:
    def a_little_wrong(**arguments: Any) -> Any:
        out, stats = soft_embed(**arguments)  # type: ignore[misc]
        return out, stats._replace(**{statistic: getattr(stats, statistic) + 1e-5})

    monkeypatch.setattr(accuracy, "soft_embed", a_little_wrong)
    with pytest.raises(AssertionError, match=f"{statistic}: error"):
        assert_as_accurate_as_eager(leading=(3,), **WIDE)


def test_shapes_by_default_tiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (tiles_torch.VOCAB_CHUNK, tiles_torch.ROW_TILE) != (16, 4)
    vocab = 2 * tiles_torch.VOCAB_CHUNK + 7
    leading = (tiles_torch.ROW_TILE + 3,)
    assert_as_accurate_as_eager(leading=leading, vocab=vocab, width=12, dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 40),
    width=st.integers(1, 7),
    embed=st.none() | st.integers(1, 7),
    bias=st.booleans(),
    row_temperature=st.booleans(),
    chunk=st.integers(1, 45),
    tile=st.integers(1, 10),
)
def test_any_shape(
    rows: int,
    vocab: int,
    width: int,
    embed: int | None,
    bias: bool,
    row_temperature: bool,
    chunk: int,
    tile: int,
) -> None:
    tensors = random_inputs((rows,), vocab, width, embed, bias, row_temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_torch, "VOCAB_CHUNK", chunk)
        patch.setattr(tiles_torch, "ROW_TILE", tile)
        ours = run(soft_embed, tensors, torch.float64, True, {})
    truth = run(soft_embed_reference, tensors, torch.float64, True, {})
    for name, exact in truth.items():
        torch.testing.assert_close(
            ours[name], exact, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradcheck() -> None:
    tensors = random_inputs((5,), vocab=21, width=4, embed=3, bias=True, row_temperature=True)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(names, values, strict=True))
        out, stats = soft_embed(**arguments, softcap=2.5, logit_scale=1.2, embed_scale=1.7, return_stats=True)
        return out, stats.lse, stats.entropy

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors.values()])


def test_gradcheck_tied() -> None:
    tensors = random_inputs((5,), vocab=21, width=4)
    assert torch.autograd.gradcheck(soft_embed, [tensor.requires_grad_() for tensor in tensors.values()])


def test_every_subset_of_gradients() -> None:
    """Each subset gives the gradients of the full set, bitwise, and nothing for the others."""
    tensors = random_inputs(embed=6, bias=True, row_temperature=True, dtype=torch.float32)
    full = run(soft_embed, tensors, torch.float32, True, {"softcap": 4.0})
    for wanted in itertools.product([False, True], repeat=len(tensors)):
        leaves = {
            name: tensor.clone().requires_grad_(want)
            for want, (name, tensor) in zip(wanted, tensors.items(), strict=True)
        }
        out, stats = soft_embed(**leaves, softcap=4.0, return_stats=True)  # type: ignore[misc, arg-type]
        assert out.requires_grad == any(wanted)
        if not any(wanted):
            continue
        targets = [out, stats.lse, stats.entropy]
        torch.autograd.backward(
            targets, [g.to(t) for g, t in zip(upstream_gradients(out, stats), targets, strict=True)]
        )
        for want, (name, leaf) in zip(wanted, leaves.items(), strict=True):
            assert (leaf.grad is not None) == want, name
            if leaf.grad is not None:
                assert torch.equal(leaf.grad, full[f"grad {name}"]), name


@pytest.mark.parametrize(("needs", "products"), [("none", 2), ("hidden", 2 + 3), ("head", 2 + 4)])
def test_gradients_not_asked_for_are_not_computed(monkeypatch: pytest.MonkeyPatch, needs: str, products: int) -> None:
    """Products for one chunk: 2 forward; hidden: + scores, dP, dS W; tied head: + scores, dP, P^T grad, dS^T h."""
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 64)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 64)
    calls = []
    matmul = tiles_torch.matmul_nt
    for module in (scorer, soft_embed_torch):
        monkeypatch.setattr(module, "matmul_nt", lambda a, b: calls.append(1) or matmul(a, b))
    tensors = random_inputs(dtype=torch.float32)
    hidden, head = tensors["hidden"], tensors["head_weight"]
    out = soft_embed(hidden.requires_grad_(needs == "hidden"), head.requires_grad_(needs == "head"))
    assert isinstance(out, Tensor)
    if needs != "none":
        out.backward(torch.randn_like(out))
    assert len(calls) == products


def test_tied_gradient_is_the_sum_of_both_uses() -> None:
    tensors = random_inputs(dtype=torch.float64)
    head = tensors["head_weight"]
    upstream = torch.randn(11, 9, dtype=torch.float64)

    def gradients(first: Tensor, second: Tensor | None) -> None:
        soft_embed(tensors["hidden"], first, second).backward(upstream)

    untied_head, untied_embed = head.clone().requires_grad_(), head.clone().requires_grad_()
    gradients(untied_head, untied_embed)
    assert untied_head.grad is not None
    expected = untied_head.grad + untied_embed.grad
    for same in (False, True):
        tied = head.clone().requires_grad_()
        gradients(tied, tied if same else None)
        torch.testing.assert_close(tied.grad, expected, rtol=1e-12, atol=1e-13)


def test_frozen_use_of_a_shared_matrix() -> None:
    """A detached alias is a use of its own: its gradient must not be added."""
    tensors = random_inputs(dtype=torch.float64)
    head = tensors["head_weight"].requires_grad_()
    upstream = torch.randn(11, 9, dtype=torch.float64)
    (ours,) = torch.autograd.grad(soft_embed(tensors["hidden"], head, head.detach()), head, upstream)
    reference, _ = soft_embed_reference(tensors["hidden"], head, head.detach())
    (expected,) = torch.autograd.grad(reference, head, upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shift", [-3e4, -300.0, 300.0, 3e4])
def test_extreme_logits(shift: float) -> None:
    """A common offset of all logits, far outside the range of exp, changes nothing but lse."""
    tensors = random_inputs(bias=True)
    plain, stats = soft_embed(**tensors, return_stats=True)  # type: ignore[misc, arg-type]
    tensors["bias"] = tensors["bias"] + shift
    moved, moved_stats = soft_embed(**tensors, return_stats=True)  # type: ignore[misc, arg-type]
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moved_stats.lse, stats.lse + shift, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(moved_stats.entropy, stats.entropy, rtol=1e-9, atol=1e-9)
    assert_as_accurate_as_eager(with_stats=False, bias=True, shift=shift, dtype=torch.float32)


def test_one_hot_is_exact() -> None:
    """Scores apart by thousands: exactly the best row, no entropy, no gradient through the scores."""
    hidden = torch.eye(3, 9).mul(1e4).requires_grad_()
    head = torch.eye(53, 9)[torch.randperm(53)]
    head[head.sum(1) == 0, 8] = -1.0
    out, stats = soft_embed(hidden, head, return_stats=True)
    assert torch.equal(out, torch.eye(3, 9))
    assert torch.equal(stats.max_prob, torch.ones(3))
    assert torch.equal(stats.entropy, torch.zeros(3))
    (grad,) = torch.autograd.grad([out, stats.entropy], hidden, [torch.randn(3, 9), torch.randn(3)])
    assert torch.equal(grad, torch.zeros(3, 9))


def test_entries_removed_by_a_bias_of_minus_infinity() -> None:
    """Whole chunks removed: the result and every gradient are those of the shorter vocabulary."""
    tensors = random_inputs(embed=6, bias=True)
    kept = torch.zeros(53, dtype=torch.bool)
    kept[20:31] = True
    removed = {**tensors, "bias": tensors["bias"].masked_fill(~kept, -torch.inf)}
    short = {name: tensor if name == "hidden" else tensor[kept] for name, tensor in tensors.items()}
    ours = run(soft_embed, removed, torch.float64, True, {"temperature": 0.8})
    truth = run(soft_embed_reference, short, torch.float64, True, {"temperature": 0.8})
    for name, exact in truth.items():
        if name == "argmax":
            assert torch.equal(ours[name], exact + 20)
        elif name in ("grad head_weight", "grad embed_weight", "grad bias"):
            torch.testing.assert_close(ours[name][kept], exact, rtol=1e-11, atol=1e-12)
            assert not ours[name][~kept].any()
        else:
            torch.testing.assert_close(ours[name], exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0), (1,), (1, 1), ()])
def test_no_rows_and_one_row(leading: tuple[int, ...]) -> None:
    tensors = random_inputs(leading, embed=6, bias=True)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    out, stats = soft_embed(**tensors, return_stats=True)  # type: ignore[misc, arg-type]
    assert out.shape == (*leading, 6)
    assert all(stat.shape == leading for stat in (*stats[:4], *stats.full))
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    if out.numel() == 0:
        assert all(not grad.any() for grad in grads)
    else:
        expected, _ = soft_embed_reference(**tensors)  # type: ignore[arg-type]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs_and_gradients(dtype: torch.dtype) -> None:
    tensors = random_inputs((4, 5), embed=6, bias=True, dtype=dtype)
    expected = run(soft_embed, tensors, dtype, False, {})
    strided = {
        "hidden": tensors["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "head_weight": tensors["head_weight"].T.contiguous().T,
        "embed_weight": torch.stack([tensors["embed_weight"]] * 2, -1)[..., 0],
        "bias": torch.stack([tensors["bias"]] * 3, -1)[..., 1],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    leaves = {name: tensor.requires_grad_() for name, tensor in strided.items()}
    out = soft_embed(**leaves)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    upstream = upstream_gradients(out, None)[0].to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    # Other strides may take another product kernel, which rounds differently: a few units, no more.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected["out"], rtol=tolerance, atol=tolerance)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, expected[f"grad {name}"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_a_bad_row_stays_alone(bad: float, options: dict[str, Any]) -> None:
    tensors = random_inputs(dtype=torch.float32)
    clean = run(soft_embed, tensors, torch.float32, True, options)
    tensors["hidden"][5, 3] = bad
    spoilt = run(soft_embed, tensors, torch.float32, True, options)
    others = torch.arange(11) != 5
    for name in ("out", "lse", "entropy", "max_prob", "argmax", "grad hidden"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    if not options or bad != bad:
        assert spoilt["out"][5].isnan().all()
    assert 0 <= spoilt["argmax"][5] < 53


def test_second_backward_gives_the_same() -> None:
    """Nothing saved is mutated, and inputs stay as they were; two runs are bitwise equal."""
    tensors = random_inputs(embed=6, bias=True, row_temperature=True, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    out, stats = soft_embed(**tensors, softcap=4.0, return_stats=True)  # type: ignore[misc, arg-type]
    targets = [out, stats.lse, stats.entropy]
    gradients = [g.to(t) for g, t in zip(upstream_gradients(out, stats), targets, strict=True)]
    first = torch.autograd.grad(targets, leaves, gradients, retain_graph=True)
    second = torch.autograd.grad(targets, leaves, gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("shape", "options"),
    [({}, {}), ({"embed": 6, "bias": True, "row_temperature": True}, {"softcap": 4.0})],
    ids=["plain", "all"],
)
def test_unused_results_need_no_gradient(shape: dict[str, Any], options: dict[str, Any]) -> None:
    """Only one of out, lse, entropy in the loss: the gradients of the definition for every input."""
    tensors = random_inputs(**shape)
    for index, used in enumerate(("out", "lse", "entropy")):
        found = []
        for function, more in ((soft_embed_reference, {}), (soft_embed, {"return_stats": True})):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            out, stats = function(**leaves, **options, **more)  # type: ignore[operator]
            target = (out, stats.lse, stats.entropy)[index]
            upstream = upstream_gradients(out, stats)[index]
            # embed_weight has no part in lse and entropy
            found.append(torch.autograd.grad(target, list(leaves.values()), upstream, materialize_grads=True))
        for name, exact, ours in zip(tensors, *found, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12, msg=f"{used}, {name}")


def test_which_results_have_gradients() -> None:
    tensors = random_inputs()
    tensors["hidden"].requires_grad_()
    _, stats = soft_embed(**tensors, return_stats=True)  # type: ignore[misc, arg-type]
    assert stats.lse.requires_grad
    assert stats.entropy.requires_grad
    assert not stats.max_prob.requires_grad
    assert not stats.argmax.requires_grad


def test_argmax_takes_the_lowest_index_of_a_tie() -> None:
    head = torch.ones(53, 4)
    head[:18] = 0.0
    _, stats = soft_embed(torch.ones(6, 4), head, return_stats=True)
    assert stats.argmax.tolist() == [18] * 6


def test_embed_scale_of_zero() -> None:
    tensors = random_inputs()
    assert torch.equal(soft_embed(**tensors, embed_scale=0.0), torch.zeros_like(tensors["hidden"]))  # type: ignore[arg-type]


def test_functional_gradient() -> None:
    tensors = random_inputs()
    hidden, head = tensors["hidden"], tensors["head_weight"]
    ours = torch.func.grad(lambda h: soft_embed(h, head).square().sum())(hidden)  # type: ignore[union-attr]
    exact = torch.func.grad(lambda h: soft_embed_reference(h, head)[0].square().sum())(hidden)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)
