"""Gumbel noise: the right generator, the right distribution, and a function of seed and vocabulary index alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gircse.ops import VocabShard, soft_embed, tiles_torch, top_tokens
from gircse.ops.noise import _philox, gumbel, gumbel_at
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import noise_of, random_inputs
from tests.ops.test_soft_embed_op import BACKENDS

EULER = 0.5772156649015329


def test_known_answers_of_philox() -> None:
    """Random123's vector for a zero counter and a zero key, and its chained counter of ones in the key."""
    zero = _philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))[0, 0].tolist()
    assert [f"{word:08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_large_noise_is_exact_to_the_last_places() -> None:
    """Below 2^-6 a series stands for the logarithm, which would keep a few bits of it."""
    seeds = torch.arange(64)
    uniform = (
        _philox(seeds, torch.arange(4096).expand(64, -1))
        .flatten(1)
        .to(torch.float32)
        .mul_(2.0**-32)
        .add_(2.0**-33)
        .double()
    )
    small = uniform < 2.0**-6
    assert small.sum() > 10_000
    exact = -torch.log(-torch.log1p(-uniform[small]))
    error = (gumbel(seeds, 0, 4 * 4096).double()[small] - exact).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * exact).all()


def test_any_slice_is_a_slice_of_the_whole() -> None:
    seeds = torch.tensor([0, -1, 2**62, 12345])
    whole = gumbel(seeds, 0, 103)
    for start, stop in ((0, 103), (1, 2), (3, 50), (7, 8), (64, 103), (101, 103)):
        assert torch.equal(gumbel(seeds, start, stop), whole[:, start:stop])
    assert torch.equal(gumbel(seeds.flip(0), 5, 99).flip(0), whole[:, 5:99])
    some = torch.tensor([[0, 7, 102], [5, 5, 1], [64, 3, 2], [9, 8, 100]])
    assert torch.equal(gumbel_at(seeds, some), whole.gather(1, some))


def test_distribution() -> None:
    """Mean, variance and Kolmogorov-Smirnov distance of four million draws; extremes as they should be."""
    noise = gumbel(torch.arange(64), 0, 65536).double()
    count = noise.numel()
    assert abs(noise.mean() - EULER) < 4 * math.pi / math.sqrt(6 * count)
    assert abs(noise.var() - math.pi**2 / 6) < 0.01
    ordered = noise.flatten().sort().values
    exact = torch.exp(-torch.exp(-ordered))
    empirical = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (exact - empirical).abs().max() < 1.63 / math.sqrt(count)  # the 1% point
    # the largest of n is log n + Gumbel: 4 million draws, 15.3 +- 1.3
    assert 12 < noise.max() < 24
    assert noise.isfinite().all()


def test_rows_and_neighbours_are_uncorrelated() -> None:
    noise = gumbel(torch.arange(32), 0, 16384).double()
    scaled = (noise - noise.mean()) / noise.std()
    between_rows = scaled @ scaled.T / scaled.shape[1]
    between_rows.fill_diagonal_(0)
    assert between_rows.abs().max() < 5 / math.sqrt(scaled.shape[1])
    for lag in (1, 2, 3, 4, 5, 64):
        correlation = (scaled[:, lag:] * scaled[:, :-lag]).mean()
        assert abs(correlation) < 5 / math.sqrt(scaled.numel()), lag


def test_the_winner_is_distributed_as_the_softmax() -> None:
    """The Gumbel-max trick: argmax(s + g) falls on v with probability softmax(s)_v. Chi-squared over the seeds, by the
    torch backend; the tests below hold that the kernels draw the same noise."""
    count, vocab = 4000, 11
    hidden, head = torch.randn(4), torch.randn(vocab, 4)
    drawn = soft_embed(  # one-hot rows; without statistics, which see the scores before the noise once more
        hidden.expand(count, 4), head, torch.eye(vocab), gumbel_seed=torch.arange(count), hard=True
    )
    expected = count * torch.softmax(head @ hidden, 0)
    found = torch.bincount(drawn.argmax(1), minlength=vocab)
    usual = expected >= 5
    statistic = ((found - expected) ** 2 / expected)[usual].sum()
    assert statistic < 29.6  # the 0.1% point of chi-squared with 10 degrees of freedom


@BACKENDS
@pytest.mark.parametrize("seed", [3, "rows"])
def test_noise_does_not_depend_on_place_or_tiling(backend: str, seed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_inputs((9,), 53, 8, dtype=torch.float32)
    seeds = torch.arange(9) * 7 if seed == "rows" else seed
    whole = soft_embed(**tensors, gumbel_seed=seeds, backend=backend)  # type: ignore[arg-type]
    expected, _ = soft_embed_reference(**tensors, noise=noise_of(seeds, tensors))  # type: ignore[arg-type]
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    for row in (0, 4, 8):
        one = soft_embed(
            tensors["hidden"][row],
            tensors["head_weight"],
            gumbel_seed=seeds[row] if seed == "rows" else seed,  # type: ignore[index]
            backend=backend,
        )
        torch.testing.assert_close(one, expected[row], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 10)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 2)
    again = soft_embed(**tensors, gumbel_seed=seeds, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_backward_replays_the_noise(backend: str) -> None:
    tensors = {n: t.requires_grad_() for n, t in random_inputs((9,), 53, 8, 6, bias=True, dtype=torch.float32).items()}
    seeds = torch.arange(9)
    upstream = torch.randn(9, 6)
    ours = torch.autograd.grad(
        soft_embed(**tensors, gumbel_seed=seeds, temperature=0.5, backend=backend),  # type: ignore[arg-type]
        list(tensors.values()),
        upstream,
    )
    reference, _ = soft_embed_reference(**tensors, temperature=0.5, noise=noise_of(seeds, tensors))  # type: ignore[arg-type]
    exact = torch.autograd.grad(reference, list(tensors.values()), upstream)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_values_of_rows_without_dimensions_of_size_one() -> None:
    """[B] fits hidden [B, 1, D] and [1, B, D], for every argument with a value for each row."""
    hidden, head = torch.randn(3, 8), torch.randn(37, 8)
    values: dict[str, torch.Tensor] = {
        "gumbel_seed": torch.arange(3),
        "gumbel_temperature": torch.tensor([0.5, 0.7, 0.9]),
        "top_k": torch.tensor([5, 0, 9]),
        "top_p": torch.tensor([0.9, 1.0, 0.8]),
        "min_p": torch.tensor([0.0, 0.01, 0.02]),
        "hard": torch.tensor([True, False, False]),
    }
    expected = soft_embed(hidden, head, **values)  # type: ignore[arg-type]
    for shape in ((3, 1), (1, 3), (1, 3, 1)):
        found = soft_embed(hidden.reshape(*shape, 8), head, **values)  # type: ignore[arg-type]
        assert torch.equal(found, expected.reshape(*shape, 8))  # type: ignore[union-attr, arg-type]
    warm = soft_embed(hidden[:, None], head, temperature=values["gumbel_temperature"])
    assert torch.equal(warm, soft_embed(hidden, head, temperature=values["gumbel_temperature"])[:, None])  # type: ignore[arg-type, index]
    with pytest.raises(ValueError, match=r"gumbel_seed: got shape \(3,\), expected one broadcastable to \(3, 2\)"):
        soft_embed(torch.randn(3, 2, 8), head, gumbel_seed=values["gumbel_seed"])


def test_integers_of_numpy() -> None:
    hidden, head = torch.randn(3, 8), torch.randn(37, 8)
    numpy, python = (
        soft_embed(hidden, head, gumbel_seed=kind(5), top_k=kind(9), top_p=np.float32(0.5)) for kind in (np.int64, int)
    )
    assert torch.equal(numpy, python)  # type: ignore[arg-type]
    assert torch.equal(top_tokens(hidden, head, np.int64(3))[0], top_tokens(hidden, head, 3)[0])  # type: ignore[arg-type]
    assert VocabShard(np.int64(2), np.int64(5)) == VocabShard(2, 5)  # type: ignore[arg-type]
