"""What the rules keep: lists, and thresholds in every kernel, in several tiles, splits and blocks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels.contract import Inputs, Options, Truncation

from gircse.ops import soft_embed
from gircse.ops.backends import kernels
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.kernels.small_plans import small_plans
from tests.ops.accuracy import random_inputs, run

ROWS = 19
CASES: dict[str, dict[str, Any]] = {
    "few": {"top_k": 3},
    "many": {"top_p": 0.95, "min_p": 1e-4, "gumbel_seed": 7},
    "narrowed": {"top_p": torch.linspace(0.5, 1.0, ROWS), "temperature": 0.5},
    "rows": {
        "top_k": torch.arange(1, ROWS + 1) ** 2,
        "temperature": 0.5,
        "softcap": 4.0,
        "gumbel_seed": torch.arange(ROWS),
        "gumbel_temperature": 0.4,
    },
}


# One dtype of each form meets every case; of the other, which has the same kernels, the two that say most are enough.
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("whole_rows", "dtype", "case"),
    [
        *((True, torch.bfloat16, case) for case in CASES),
        *((False, torch.float32, case) for case in CASES),
        *((False, torch.bfloat16, case) for case in ("many", "rows")),
    ],
    ids=str,
)
def test_against_float64(whole_rows: bool, dtype: torch.dtype, case: str) -> None:
    options = CASES[case]
    tensors = random_inputs((ROWS,), 107, 27, bias=True, dtype=dtype)
    with small_plans(whole_rows):
        ours = run(soft_embed, tensors, dtype, True, {**options, "backend": "triton"})
    truth = run(soft_embed_reference, tensors, torch.float64, True, options)
    for name, exact in truth.items():
        assert not ours[name].isnan().any(), name
        statistic = name in ("lse", "entropy", "max_prob", "argmax")
        tolerance = 5e-5 if dtype == torch.float32 or statistic else 0.03
        assert (ours[name].double() - exact).abs().max() <= tolerance * (exact.abs().max() + 1), name


@pytest.mark.usefixtures("interpreter")
def test_a_selection_is_that_of_a_sort() -> None:
    """Ties inside the list, ties that go on behind it, nothing but bans, NaN, and rows of very different scores, in
    several groups, tiles and blocks of rows."""
    capacity, vocab = 8, 107
    scores = torch.randn(9, vocab)
    scores[1, 20:25] = 5.0  # within the list
    scores[2] = 0.0
    scores[3, 40:90] = 3.5  # behind it
    scores[4] = -torch.inf
    scores[5, 7] = torch.nan
    scores[6, 3:] = -torch.inf  # fewer than top_k
    scores[7] = 1e30 * torch.randn(vocab)
    limit = torch.tensor([5, 3, 4, 7, 2, 3, 6, 7, 1])
    rules = Truncation(limit, torch.linspace(0.3, 1, 9), torch.full((9,), 1e-3))
    embed = torch.randn(vocab, 4)
    with small_plans(True):
        found = kernels().select(Inputs(scores, None, embed), Options(), rules, capacity)
        some = torch.tensor([0, 1, 6, 7, 8])
        part = Truncation(*(None if rule is None else rule[some] for rule in rules))
        only = kernels().select(Inputs(scores[some], None, embed), Options(), part, 0)
    for place, row in enumerate(some.tolist()):
        order = scores[row].sort(descending=True, stable=True)
        kept = order.values >= order.values[limit[row] - 1]
        kept &= order.values > -torch.inf
        probs = order.values.masked_fill(~kept, -torch.inf).softmax(0)
        above = torch.stack([probs[order.values > value].sum() for value in order.values])
        kept &= ((above < rules.top_p[row]) | (rules.top_p[row] == 1)) & (probs >= 1e-3 * probs.max())
        number = int(kept.sum())
        assert found.ids[row, :number].tolist() == order.indices[:number].tolist()
        assert torch.equal(found.scores[row, :number], order.values[:number])
        assert bool((found.scores[row, number:] == -torch.inf).all())
        finite = scores[row] > -torch.inf
        for threshold in (found.threshold[row], only.threshold[place]):
            assert torch.equal(finite & (scores[row] >= threshold), scores[row] >= order.values[number - 1])
    assert bool((found.num_kept[2:4] >= capacity).all())
    assert bool((found.num_kept[[0, 1, 4, 6, 7, 8]] < capacity).all())
    assert torch.equal(scores[2:4] >= found.threshold[2:4, None], scores[2:4] >= torch.tensor([[0.0], [3.5]]))
    assert bool((found.scores[4] == -torch.inf).all())
    assert bool(found.scores[5].isnan().all())
    torch.testing.assert_close(found.lse, scores.logsumexp(1), equal_nan=True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_tie_that_goes_on_behind_the_list(dtype: torch.dtype) -> None:
    """Such rows are walked, forward and backward, with noise, biases of single entries and bans."""
    tensors = random_inputs((4,), 61, 9, bias=True, dtype=torch.float32)
    tensors["head_weight"][20:60] = tensors["head_weight"][20]
    tensors["bias"][20:60] = tensors["bias"].max() + 9
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = {
        "top_k": 2,
        "gumbel_seed": torch.arange(4),
        "noise_scale": torch.tensor([1.0, 0.0, 0.5, 2.0]),
        "temperature": torch.tensor([1.0, 0.5, 2.0, 1.0]),
        "token_bitmask": torch.tensor([[-1, -5]], dtype=torch.int32).expand(4, 2),
        "softcap": 30.0,
    }
    with small_plans(True):
        ours = run(soft_embed, tensors, dtype, True, {**options, "backend": "triton"})
    truth = run(soft_embed_reference, tensors, torch.float64, True, options)
    for name, exact in truth.items():
        tolerance = 2e-4 if dtype == torch.float32 or name in ("lse", "entropy", "max_prob", "argmax") else 0.03
        assert (ours[name].double() - exact).abs().max() <= tolerance * (exact.abs().max() + 1), name
