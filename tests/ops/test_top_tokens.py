"""top_tokens: exact ids and probabilities, deterministic ties, no [T, V] tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.ops import tiles_torch, top_tokens
from gircse.ops.soft_embed_reference import scores_reference, top_tokens_reference

OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.6, "softcap": 4.0, "logit_scale": 0.5}]  # scores stay exact


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 7),
    vocab=st.integers(1, 60),
    chunk=st.integers(1, 64),
    tile=st.integers(1, 8),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    options=st.sampled_from(OPTIONS),
)
def test_integer_scores_with_many_ties(
    rows: int, vocab: int, chunk: int, tile: int, data: st.DataObject, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Small integers are exact in every dtype and tie all the time: ids must equal those of a stable sort."""
    n = data.draw(st.integers(1, vocab))
    hidden = torch.randint(-2, 3, (rows, 3)).to(dtype)
    head = torch.randint(-2, 3, (vocab, 3)).to(dtype)
    bias = torch.randint(-2, 3, (vocab,)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_torch, "VOCAB_CHUNK", chunk)
        patch.setattr(tiles_torch, "ROW_TILE", tile)
        ids, probs = top_tokens(hidden, head, n, bias=bias, **options)
    exact_ids, exact_probs = top_tokens_reference(hidden.double(), head.double(), n, bias=bias.double(), **options)
    assert torch.equal(ids, exact_ids)
    assert ids.dtype == torch.int64
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probs.double(), exact_probs, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("n", [1, 5, 37, 101])
def test_random_scores(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 16)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 4)
    hidden, head, bias = torch.randn(3, 3, 8), torch.randn(101, 8), torch.randn(101)
    temperature = torch.rand(3, 1) + 0.5
    ids, probs = top_tokens(hidden, head, n, bias=bias, temperature=temperature)
    exact_ids, exact = top_tokens_reference(
        hidden.double(), head.double(), n, bias=bias.double(), temperature=temperature.double()
    )
    assert torch.equal(ids, exact_ids)
    eager_ids, eager = top_tokens_reference(hidden, head, n, bias=bias, temperature=temperature)
    assert torch.equal(eager_ids, exact_ids)
    assert (probs - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-7
    assert (probs.diff(dim=-1) <= 0).all()
    assert ids.shape == probs.shape == (3, 3, n)


def test_all_of_the_vocabulary_sums_to_one() -> None:
    _, probs = top_tokens(torch.randn(4, 8), torch.randn(50, 8), 50)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4), rtol=1e-6, atol=0.0)


def test_signed_zeros_tie() -> None:
    hidden, head = torch.ones(1, 1), torch.tensor([[-1.0], [-0.0], [0.0], [-0.0], [-2.0]])
    ids, _ = top_tokens(hidden, head, 4)
    assert ids.tolist() == [[1, 2, 3, 0]]


def test_removed_entries_come_last_with_probability_zero() -> None:
    hidden, head, bias = torch.randn(2, 4), torch.randn(40, 4), torch.full((40,), -torch.inf)
    bias[30:33] = 0.0
    ids, probs = top_tokens(hidden, head, 5, bias=bias)
    assert ((ids[:, :3] >= 30) & (ids[:, :3] < 33)).all()
    assert ids[:, 3:].tolist() == [[0, 1]] * 2
    assert not probs[:, 3:].any()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2), rtol=1e-6, atol=0.0)


def test_a_row_of_nan_stays_alone() -> None:
    hidden, head = torch.randn(5, 4), torch.randn(40, 4)
    ids, probs = top_tokens(hidden, head, 6)
    hidden[2, 1] = torch.nan
    spoilt_ids, spoilt = top_tokens(hidden, head, 6)
    others = torch.arange(5) != 2
    assert torch.equal(spoilt_ids[others], ids[others])
    assert torch.equal(spoilt[others], probs[others])
    assert spoilt[2].isnan().all()
    assert ((spoilt_ids[2] >= 0) & (spoilt_ids[2] < 40)).all()


def test_largest_scores_of_any_sign() -> None:
    """The order of the keys is that of the floats over their whole range."""
    values = torch.tensor([3e38, 1.0, 1e-38, 1e-45, 0.0, -1e-45, -1e-38, -1.0, -3e38])
    shuffled = torch.randperm(len(values))
    ids, _ = top_tokens(torch.ones(1, 1), values[shuffled][:, None], len(values))
    found = values[shuffled][ids[0]]
    expected = scores_reference(torch.ones(1, 1), values[:, None])[0]
    assert torch.equal(found.sort(descending=True).values, found)
    assert torch.equal(found, expected)


def test_gradients_and_autocast_do_not_matter() -> None:
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    ids, probs = top_tokens(hidden, head, 6)
    assert not probs.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = top_tokens(hidden, head, 6)
    assert torch.equal(ids, again)
    assert torch.equal(probs, same)


@pytest.mark.parametrize(
    ("n", "options", "error", "message"),
    [
        (0, {}, ValueError, r"n: got 0, expected 1 to 5"),
        (6, {}, ValueError, r"n: got 6, expected 1 to 5"),
        (2.0, {}, TypeError, r"n: got float, expected an int"),
        (1, {"temperature": 0}, ValueError, r"temperature: got 0, expected a finite number above 0"),
        (1, {"bias": torch.zeros(4)}, ValueError, r"bias: got shape \(4,\), expected \(5,\)"),
    ],
)
def test_bad_arguments(n: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top_tokens(torch.randn(3, 4), torch.randn(5, 4), n, **options)
