"""Truncations that keep few entries: candidates against plain PyTorch in float64, with every other option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import kept_rows, selection, soft_embed, soft_embed_logits, tiles_torch, top_tokens
from gircse.ops.noise import gumbel
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import upstream_gradients
from tests.ops.test_soft_embed_memory import LargestTensor

RULES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 5},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "top_n": 4},
    "top_n": {"top_p": 0.8, "top_n": 6},
    "rows": {"top_k": torch.tensor([1, 3, 9, 20, 2, 5, 4]), "top_n": torch.tensor([3, 1, 4, 9, 1, 0, -1])},
    "general": {"top_p": 0.7},
    "none": {},
}
ROWS = torch.linspace(0.4, 1.6, 7, dtype=torch.float64)
NOISE: dict[str, dict[str, Any]] = {
    "no noise": {"softcap": 3.0, "temperature": ROWS, "logit_scale": 1.5},
    "noise": {"gumbel_seed": 3, "noise_scale": ROWS - 0.4, "hard": torch.arange(7) % 2 == 0},
    "relaxed": {"gumbel_seed": 3, "gumbel_temperature": ROWS, "temperature": 0.7, "embed_scale": 2.0},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and chunks, the last of each ragged."""
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 16)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 4)
    monkeypatch.setattr(selection, "WORKSPACE_BYTES", 2 * 8 * 53 * 5)
    monkeypatch.setattr(selection, "_PART_BYTES", 8 * 53 * 2)
    monkeypatch.setattr(kept_rows, "_GATHERED_BYTES", 4 << 10)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def leaves_of(rules: dict[str, Any], noise: dict[str, Any], vocab: int) -> tuple[dict[str, Any], list[Tensor]]:
    """All options of a call of 7 rows, and those that have gradients."""
    bits = torch.randint(-(2**31), 2**31 - 1, (7, -(-vocab // 32)), dtype=torch.int32) | 0x0FFF00
    bias, values = draw(vocab), draw(7, 6)
    options = {"bias": bias, "token_bitmask": bits, "logit_bias": (torch.randint(0, vocab, (7, 6)), values)}
    by_row = {
        name: value.clone().requires_grad_()
        for name, value in noise.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return {**options, **rules, **noise, **by_row}, [bias, values, *by_row.values()]


def reference(options: dict[str, Any], *matrices: Tensor | None) -> Any:
    options = dict(options)
    if options.pop("gumbel_seed", None) is not None:
        options["noise"] = gumbel(torch.full((7,), 3), 0, matrices[1].shape[0]).double()  # type: ignore[union-attr]
    for name in ("top_k", "top_n"):
        if isinstance(options.get(name), Tensor):
            options[name] = torch.where(options[name] <= 0, 10**9, options[name])
    return soft_embed_reference(*matrices, **options)  # type: ignore[arg-type]


def assert_same(found: Any, exact: Any, leaves: list[Tensor]) -> None:
    grads = []
    for out, stats in (found, exact):
        upstream = [
            g.to(t) for g, t in zip(upstream_gradients(out, stats), (out, stats.lse, stats.entropy), strict=True)
        ]
        grads.append(torch.autograd.grad([out, stats.lse, stats.entropy], leaves, upstream))
    (out, stats), (true_out, true) = found, exact
    ours = [out, *stats[:4], *stats.full, *grads[0]]
    for one, other in zip(ours, [true_out, *true[:4], *true.full, *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("vocab", [53, 37])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE.keys())
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_values_statistics_and_all_gradients(rules: dict[str, Any], noise: dict[str, Any], vocab: int) -> None:
    options, leaves = leaves_of(rules, noise, vocab)
    hidden, head, embed = draw(7, 9), draw(vocab, 9), draw(vocab, 6)
    for table in (None, embed):
        ours = soft_embed(hidden, head, table, **options, return_stats=True)
        more = [hidden, head] if table is None else [hidden, head, table]
        assert_same(ours, reference(options, hidden, head, table), [*leaves, *more])
    logits = draw(7, vocab)
    ours = soft_embed_logits(logits, embed, **options, return_stats=True)
    identity = torch.eye(vocab, dtype=torch.float64)
    assert_same(ours, reference(options, logits, identity, embed), [*leaves, logits, embed])


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE.keys())
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_top_tokens_are_the_largest_weights(rules: dict[str, Any], noise: dict[str, Any]) -> None:
    """Ids, weights and their gradients towards everything, for fewer and more entries than are kept."""
    noise = {name: value for name, value in noise.items() if name not in ("hard", "embed_scale")}
    options, leaves = leaves_of(rules, noise, 53)
    leaves += [hidden := draw(7, 9), head := draw(53, 9)]
    whole, _ = reference(options, hidden, head, torch.eye(53, dtype=torch.float64))
    for n in (3, 40):
        ids, weights = top_tokens(hidden, head, n, **options)
        true, order = whole.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids[true[:, :n] > 0], order[:, :n][true[:, :n] > 0])
        torch.testing.assert_close(weights, true[:, :n], rtol=1e-11, atol=1e-13, check_dtype=False)
        assert weights.requires_grad == bool(rules or "gumbel_seed" in options)
        if weights.requires_grad:
            upstream = torch.randn_like(weights)
            ours = torch.autograd.grad(weights, leaves, upstream)
            for one, other in zip(
                ours, torch.autograd.grad(true[:, :n], leaves, upstream, retain_graph=True), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_noisy_tokens_are_drawn_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of the two highest noisy scores come as often as p_i p_j / (1 - p_i) says."""
    monkeypatch.undo()
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 10_000
    logits = probs.log().expand(draws, -1).contiguous()
    ids, _ = top_tokens(logits, torch.eye(4), 2, gumbel_seed=torch.arange(draws))
    for i in range(4):
        for j in set(range(4)) - {i}:
            expected = (probs[i] * probs[j] / (1 - probs[i])).item()
            share = ((ids[:, 0] == i) & (ids[:, 1] == j)).double().mean().item()
            assert abs(share - expected) <= 5 * (expected / draws) ** 0.5


def test_ties_beyond_the_candidates_are_kept() -> None:
    """Forty entries of one score straddle a top_k whose candidates are 16: all of them stay, in value and gradient."""
    scores = torch.cat([torch.tensor([3.0, 2.0]), torch.ones(40), torch.linspace(0, -1, 11)]).double().expand(7, -1)
    scores = torch.cat([scores[:6].flip(1), draw(1, 53).detach()]).requires_grad_()
    embed = draw(53, 6)
    identity = torch.eye(53, dtype=torch.float64, requires_grad=True)
    for options in ({"top_k": 3}, {"top_k": 3, "top_p": 0.2}, {"top_n": 3}, {"top_k": 3, "gumbel_seed": 3}):
        ours = soft_embed(scores, identity, embed, **options, return_stats=True)  # type: ignore[call-overload]
        assert_same(ours, reference(options, scores, identity, embed), [scores, identity, embed])
    ids, weights = top_tokens(scores.detach(), identity.detach(), 45, top_k=3)
    assert ids[0, :42].tolist() == [52, 51, *range(11, 51)]
    assert ((weights > 0).sum(1) == torch.tensor([42] * 6 + [3])).all()


def test_banned_rows_and_no_rows() -> None:
    """A row of which nothing is left is not a number, in that row alone, as softmax has it; no rows give none."""
    hidden, head, bits = torch.randn(3, 9), torch.randn(53, 9), torch.full((3, 2), -1, dtype=torch.int32)
    bits[1] = 0
    out, stats = soft_embed(hidden, head, token_bitmask=bits, top_k=5, return_stats=True)
    assert out.isnan().any(1).tolist() == out.isnan().all(1).tolist() == [False, True, False]
    assert stats.full.entropy.isnan().tolist() == [False, True, False]
    bits[1, 0] = 5  # two entries, fewer than k: they alone are mixed
    out = soft_embed(hidden, head, token_bitmask=bits, top_k=5)  # type: ignore[assignment]
    torch.testing.assert_close(out[1], torch.softmax(head[[0, 2]] @ hidden[1], 0) @ head[[0, 2]])
    leaf = head.clone().requires_grad_()
    empty = soft_embed(hidden[:0], leaf, top_k=5)
    empty.sum().backward()  # type: ignore[union-attr]
    assert empty.shape == (0, 9)  # type: ignore[union-attr]
    assert not leaf.grad.any()  # type: ignore[union-attr]
    assert top_tokens(hidden[:0], head, 4, top_k=5)[0].shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_kept_rows_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Rows of the table that nobody keeps get exactly nothing, and nothing of [rows, candidates, width] is made."""
    monkeypatch.undo()
    rows, vocab, width = 64, 500, 2048
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    head = (torch.randn(vocab, width) * 0.05).to(dtype).requires_grad_()
    with LargestTensor([hidden, head]) as mode:
        soft_embed(hidden, head, top_k=3).float().square().sum().backward()  # type: ignore[union-attr]
    assert head.grad is not None
    kept = top_tokens(hidden.detach(), head.detach(), 3, top_k=3)[0].unique()
    assert torch.equal(head.grad.abs().sum(1).nonzero()[:, 0], kept)
    assert mode.largest <= max(kept_rows._GATHERED_BYTES, 4 * vocab * width) < 4 * rows * 16 * width
