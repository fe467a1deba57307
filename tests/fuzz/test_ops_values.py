"""The ops on tensors of every dtype, layout and size of numbers against their float64 definitions, gradients included.

The allowed error is that of rounding: of the result to its dtype, and of scores and sums to float32 before that.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gircse import ops
from gircse.ops.info_nce_reference import icr_objective_reference, info_nce_reference, pool_steps_reference
from gircse.ops.noise import gumbel
from gircse.ops.soft_embed_reference import soft_embed_reference, top_tokens_reference
from tests.fuzz.profiles import fuzz
from tests.fuzz.tensors import DTYPES, draw_tensor, laid_out, seeds

dtypes = st.sampled_from(DTYPES)
poolings = st.sampled_from(["mean", "last", "weighted"])


def precision(dtype: torch.dtype) -> float:
    """Of scores and sums."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def plain(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def close(found: Tensor, expected: Tensor, allowed: float | Tensor, name: str) -> None:
    assert found.shape == expected.shape, name
    assert bool(found.isfinite().all()), f"{name}: not finite"
    excess = (found.double() - expected).abs() - allowed
    assert not excess.numel() or float(excess.max()) <= 0, f"{name}: beyond rounding by {float(excess.max())}"


@st.composite
def soft_embed_calls(draw: Any) -> dict[str, Any]:
    dtype = draw(dtypes)
    leading = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 2), (2, 0)]))
    width, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    call: dict[str, Any] = {
        "hidden": draw_tensor(draw, (*leading, width), dtype, scale=draw(st.sampled_from([0.0, 1e-4, 1.0, 6.0]))),
        "head_weight": draw_tensor(draw, (vocab, width), dtype),
        "softcap": draw(st.sampled_from([None, 2.0, 30])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.0, 0.0])),
        "embed_scale": draw(st.sampled_from([1, 3.5, -1.0, 0.0])),
        "return_stats": True,
    }
    if draw(st.booleans()):
        call["embed_weight"] = draw_tensor(draw, (vocab, draw(st.integers(1, 4))), dtype)
    if draw(st.booleans()):
        bias = draw_tensor(draw, (vocab,), dtype).clone()
        if vocab > 1 and call["softcap"] is None and call["logit_scale"] > 0 and draw(st.booleans()):
            bias[draw(st.integers(0, vocab - 1))] = -torch.inf
        call["bias"] = bias
    temperatures = st.sampled_from([0.5, 1, 2.0])
    call["temperature"] = draw(temperatures)
    if draw(st.booleans()):
        call["gumbel_seed"] = draw(st.integers(-(2**63), 2**63 - 1))
        if draw(st.booleans()):
            call["gumbel_temperature"] = draw(temperatures)
    elif draw(st.booleans()):
        shape = leading if draw(st.booleans()) else (1,) * len(leading)
        call["temperature"] = torch.rand(shape, generator=torch.Generator().manual_seed(draw(seeds))) + 0.5
    return call


@fuzz(60)
@given(call=soft_embed_calls())
def test_soft_embed(call):
    dtype, seed = call["hidden"].dtype, call.pop("gumbel_seed", None)
    leaves = {n: v.detach().requires_grad_() for n, v in call.items() if isinstance(v, Tensor) and n != "temperature"}
    out, stats = ops.soft_embed(**{**call, **leaves}, gumbel_seed=seed)
    exact = {name: plain(value) for name, value in call.items() if name != "return_stats"}
    exact |= {name: exact[name].requires_grad_() for name in leaves}
    leading, vocab = call["hidden"].shape[:-1], call["head_weight"].shape[0]
    if seed is not None:
        exact["noise"] = gumbel(torch.tensor([seed]), 0, vocab)[0].double().expand(*leading, vocab)
    expected, expected_stats = soft_embed_reference(**exact)
    assert out.dtype == dtype

    # scores are off by at most `off`, so probabilities by a factor of at most exp(2 * off)
    size = (exact["hidden"].detach().abs() @ exact["head_weight"].detach().abs().T).amax() if out.numel() else 0.0
    finite_bias = exact["bias"].detach().nan_to_num(neginf=0.0).abs().max() if "bias" in exact else 0.0
    noise = exact["noise"].abs().max() if seed is not None and out.numel() else 0.0
    off = 32 * precision(dtype) * (1 + float(abs(call["logit_scale"]) * (size + finite_bias) + noise)) / 0.25
    values = exact.get("embed_weight", exact["head_weight"]).detach().abs().max()
    scale = float(values) * abs(call["embed_scale"])
    close(out, expected, scale * (4 * off + 2 * torch.finfo(dtype).eps) + torch.finfo(dtype).tiny, "out")
    close(stats.lse, expected_stats.lse, 4 * off, "lse")
    close(stats.entropy, expected_stats.entropy, 40 * off, "entropy")
    close(stats.max_prob, expected_stats.max_prob, 4 * off, "max_prob")

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    for name, leaf in leaves.items():
        gradient = exact[name].grad
        assert leaf.grad.dtype == dtype
        largest = float(gradient.abs().max()) if gradient.numel() else 0.0
        terms = (1 + scale) * (1 + float(size)) * max(1, upstream.numel())  # what cancels may be far larger
        close(leaf.grad, gradient, 4 * torch.finfo(dtype).eps * largest + 40 * off * terms, f"gradient of {name}")


@fuzz(30)
@given(data=st.data())
def test_a_row_that_is_not_finite_spoils_itself_only(data):
    hidden = draw_tensor(data.draw, (4, 3), data.draw(dtypes)).clone()
    head = draw_tensor(data.draw, (9, 3), hidden.dtype)
    options = data.draw(
        st.sampled_from([{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"gumbel_seed": 3}, {"hard": True}])
    )
    expected = ops.soft_embed(hidden, head, **options)
    row = data.draw(st.integers(0, 3))
    hidden[row, data.draw(st.integers(0, 2))] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    found = ops.soft_embed(hidden, head, **options)
    others = [r for r in range(4) if r != row]
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0)
    ids, _ = ops.top_tokens(hidden, head, 3)
    assert bool(((ids >= 0) & (ids < 9)).all())


@fuzz(40)
@given(data=st.data())
def test_truncation_keeps_what_its_rules_say(data):
    """On scores that are whole numbers, exactly: ties stay or go together."""
    vocab = data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    scores = torch.randint(-4, 5, (3, vocab), generator=generator)
    hidden = torch.eye(3, dtype=data.draw(dtypes))
    head = laid_out(scores.T.to(hidden.dtype), data.draw(st.sampled_from(["contiguous", "transposed", "strided"])))
    rules = {
        "top_k": data.draw(st.none() | st.integers(1, vocab + 2)),
        "top_p": data.draw(st.none() | st.sampled_from([0.11, 0.53, 0.97, 1.0])),
    }
    rules["min_p"] = data.draw(st.none() | st.sampled_from([0.0, 0.013, 0.21, 1.0]))
    embed = torch.eye(vocab, dtype=hidden.dtype)
    found = ops.soft_embed(hidden, head, embed, **rules)
    expected, _ = soft_embed_reference(hidden.double(), head.double(), embed.double(), **rules)
    close(found, expected, 8 * torch.finfo(hidden.dtype).eps, "probabilities")


@fuzz(30)
@given(data=st.data())
def test_top_tokens(data):
    dtype, vocab = data.draw(dtypes), data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    scores = torch.randint(-3, 4, (vocab, 3), generator=generator)  # ties: the lower index comes first
    hidden = torch.eye(3, dtype=dtype)[: data.draw(st.integers(0, 3))]
    n = data.draw(st.integers(1, vocab))
    ids, probabilities = ops.top_tokens(
        hidden,
        laid_out(scores.to(dtype), data.draw(st.sampled_from(["contiguous", "transposed", "strided", "offset"]))),
        n,
    )
    expected_ids, expected = top_tokens_reference(hidden.double(), scores.double(), n)
    assert torch.equal(ids, expected_ids)
    close(probabilities, expected, 16 * precision(dtype), "probabilities")


@fuzz(40)
@given(data=st.data())
def test_stepwise_info_nce(data):
    dtype = data.draw(dtypes)
    rows, num_steps, width, each = (data.draw(st.integers(1, n)) for n in (4, 3, 5, 3))
    scale = data.draw(st.sampled_from([1e-3, 1.0, 100.0]))
    queries = draw_tensor(data.draw, (rows, num_steps, width), dtype, scale=scale)
    docs = draw_tensor(data.draw, (rows * each, num_steps, width), dtype, scale=scale)
    options: dict[str, Any] = {"pooling": data.draw(poolings), "temperature": data.draw(st.sampled_from([0.02, 1.0]))}
    options |= {"include_queries": data.draw(st.booleans()), "symmetric": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["target"] = torch.tensor(
            data.draw(st.lists(st.integers(0, rows * each - 1), min_size=rows, max_size=rows))
        )
    target = options.get("target", torch.arange(rows) * each)
    if data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(seeds))
        mask = torch.rand(rows, rows * each, generator=generator) < 0.4
        mask[torch.arange(rows), target] = False
        options["mask"] = laid_out(mask, data.draw(st.sampled_from(["contiguous", "transposed"])))
    leaves = [t.detach().requires_grad_() for t in (queries, docs)]
    exact = [plain(t).requires_grad_() for t in (queries, docs)]
    found, stats = ops.stepwise_info_nce(*leaves, **options, return_stats=True)
    expected = info_nce_reference(*exact, **options)
    assert all(0 <= float(a) <= 1 for a in stats.accuracy)
    # sums of steps may cancel: then the direction is as uncertain as the sum
    sums = [pool_steps_reference(t.detach(), options["pooling"]) for t in exact]
    most = [t.detach().norm(dim=-1).amax() for t in exact]
    condition = max(float((m / s.norm(dim=-1).clamp_min(1e-300)).max()) for m, s in zip(most, sums, strict=True))
    if condition > 1e4:
        return
    off = 64 * precision(dtype) * condition / options["temperature"]
    close(found, expected, off * (1 + expected.detach().abs()), "losses")
    weights = torch.randn(num_steps, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        smallest = min(float(s.norm(dim=-1).min()) for s in sums)
        allowed = (
            4 * torch.finfo(dtype).eps * float(reference.grad.abs().max()) + 8 * off / options["temperature"] / smallest
        )
        close(leaf.grad, reference.grad, allowed + torch.finfo(dtype).tiny, "gradient")


@fuzz(30)
@given(data=st.data())
def test_pool_steps(data):
    shape = data.draw(st.sampled_from([(0, 2, 3), (1, 1, 1), (2, 4, 3), (3, 2), (2, 2, 2, 2), (2, 0, 3)]))
    steps, pooling = draw_tensor(data.draw, shape, data.draw(dtypes)), data.draw(poolings)
    found = ops.pool_steps(steps, pooling)
    expected = pool_steps_reference(plain(steps), pooling) if shape[-2] else plain(steps)
    close(found, expected, 16 * precision(steps.dtype) * (1 + expected.abs()) * 4, "pooled")


@fuzz(40)
@given(data=st.data())
def test_l2_normalize_of_any_size(data):
    dtype = data.draw(dtypes)
    info = torch.finfo(dtype)
    shape = data.draw(st.sampled_from([(0, 3), (1, 1), (3, 5), (2, 2, 4), (3,), (2, 0)]))
    size = data.draw(st.sampled_from([0.0, 1.0, info.max / 8, info.tiny, info.tiny * 16, 1e-3]))
    vectors = draw_tensor(data.draw, shape, torch.float64).clamp(-4, 4) * size
    vectors = vectors.to(dtype)
    leaf = vectors.detach().requires_grad_()
    found = ops.l2_normalize(leaf)
    wide = vectors.double()
    if wide.numel():
        wide = wide / torch.where(wide == 0, 1.0, wide.abs()).amax(-1, keepdim=True)
    norm = wide.norm(dim=-1, keepdim=True)
    close(found.detach(), torch.where(norm > 0, wide / norm, 0.0), 8 * info.eps, "unit vectors")
    found.sum().backward()
    assert not bool(leaf.grad.isnan().any())


@fuzz(40)
@given(data=st.data())
def test_icr_objective(data):
    dtype = data.draw(dtypes)
    losses = data.draw(
        st.lists(st.sampled_from([0.0, 1e-6, 0.1, 1.0, 5.0, 100.0]) | st.floats(0, 50), min_size=1, max_size=5)
    )
    options = {
        "reg_weight": data.draw(st.sampled_from([0.0, 1.0, 3])),
        "reduction": data.draw(st.sampled_from(["mean", "sum"])),
    }
    options["detach_previous"] = data.draw(st.booleans())
    leaf = laid_out(
        torch.tensor(losses, dtype=torch.float64).to(dtype), data.draw(st.sampled_from(["strided", "offset"]))
    )
    exact = leaf.double().requires_grad_()
    leaf = leaf.detach().requires_grad_()
    found, expected = ops.icr_objective(leaf, **options), icr_objective_reference(exact, **options)
    assert found.dtype == dtype
    close(found.detach(), expected.detach(), 8 * torch.finfo(dtype).eps * (20 + sum(losses)), "objective")
    found.backward()
    expected.backward()
    assert bool(leaf.grad.isfinite().all()) or not bool((exact.grad.abs() < torch.finfo(dtype).max).all())
