"""What changes the scores of single rows: temperatures and noise by row, banned tokens, biases of single entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import soft_embed, tiles_torch
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import noise_of, random_inputs

ROWS, VOCAB = 6, 53
BANNED = torch.rand(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) < 0.4


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 16)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 4)


def packed(allowed: Tensor) -> Tensor:
    """[T, V] bool as [T, ceil(V / 32)] int32."""
    bits = torch.nn.functional.pad(allowed.long(), (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def leaves(**options: Any) -> dict[str, Any]:
    return {n: v.clone().requires_grad_() if n in DIFFERENTIABLE else v for n, v in options.items()}


DIFFERENTIABLE = ("temperature", "gumbel_temperature", "noise_scale", "values", "logit_scale", "embed_scale")
TEMPERATURES = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)
SEEDS = torch.arange(ROWS, dtype=torch.int32)
IDS = torch.randint(0, VOCAB, (ROWS, 5), generator=torch.Generator().manual_seed(2))
IDS[:, 4] = IDS[:, 0]  # twice in each row
VALUES = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CASES: dict[str, dict[str, Any]] = {
    "two temperatures": {"temperature": TEMPERATURES, "gumbel_temperature": TEMPERATURES.flip(0), "gumbel_seed": SEEDS},
    "noise by row": {
        "temperature": TEMPERATURES,
        "noise_scale": TEMPERATURES - 0.5,
        "gumbel_seed": SEEDS,
        "top_p": 0.8,
    },
    "bans": {"token_bitmask": packed(~BANNED), "top_k": 7, "temperature": TEMPERATURES},
    "bias": {"ids": IDS, "values": VALUES, "temperature": TEMPERATURES},
    "bias, soft-cap": {"ids": IDS, "values": VALUES, "softcap": 3.0, "temperature": TEMPERATURES, "top_n": 20},
    "scales": {
        "logit_scale": torch.tensor(1.5, dtype=torch.float64),
        "embed_scale": torch.tensor([0.3], dtype=torch.float64),
        "temperature": TEMPERATURES,
        "gumbel_seed": SEEDS,
    },
    "scales, soft-cap": {"logit_scale": torch.tensor(1.5, dtype=torch.float64), "softcap": 3.0},
    "everything": {
        "ids": IDS,
        "values": VALUES,
        "token_bitmask": packed(~BANNED),
        "softcap": 4.0,
        "temperature": TEMPERATURES,
        "noise_scale": TEMPERATURES.flip(0),
        "gumbel_temperature": TEMPERATURES.roll(1),
        "gumbel_seed": SEEDS,
        "top_k": 20,
        "min_p": 0.01,
        "top_n": 9,
    },
}


def both(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Any, Any]:
    """Ours and the reference's (token, statistics)."""
    options = dict(options)
    if "ids" in options:
        options["logit_bias"] = options.pop("ids"), options.pop("values")
    ours = soft_embed(**tensors, **options, return_stats=True)
    if "gumbel_seed" in options:
        options["noise"] = noise_of(options.pop("gumbel_seed").long(), tensors).double()
    return ours, soft_embed_reference(**tensors, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("embed", [None, 7])
def test_values_and_gradients(case: str, embed: int | None) -> None:
    tensors = {n: t.requires_grad_() for n, t in random_inputs((ROWS,), VOCAB, 9, embed, bias=True).items()}
    options = leaves(**CASES[case])
    wanted = [*tensors.values(), *(options[n] for n in DIFFERENTIABLE if n in options)]
    upstream = torch.randn(ROWS, embed or 9, dtype=torch.float64)
    gradients = []
    (out, stats), (plain, plain_stats) = both(tensors, options)
    for token, found in ((out, stats), (plain, plain_stats)):
        loss = (token * upstream).sum() + (found.lse * upstream[:, 0]).sum() + (found.entropy * upstream[:, 1]).sum()
        gradients.append(torch.autograd.grad(loss, wanted, create_graph=True))
    torch.testing.assert_close((out, *stats), (plain, *plain_stats), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), wanted) for grads in gradients]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-9)
