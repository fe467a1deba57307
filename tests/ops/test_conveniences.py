"""What callers have in hand: shapes, dtypes and spellings of "off" that mean the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import soft_embed, top_tokens
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import random_inputs, rms
from tests.ops.test_row_options import CASES, ROWS, VOCAB, packed


def same(ours: Any, other: Any) -> None:
    assert torch.equal(ours, other)


def test_spellings_of_the_same() -> None:
    hidden, head = torch.randn(3, 2, 8), torch.randn(37, 8)
    plain = soft_embed(hidden, head)
    same(soft_embed(hidden, head, softcap=0, top_k=-1, top_n=0), plain)
    torch.testing.assert_close(soft_embed(hidden, head, top_k=torch.tensor([[-1, 0]])), plain)
    warm = torch.tensor([0.5, 0.7, 0.9])
    by_row = soft_embed(hidden[:, 0], head, temperature=warm)
    same(soft_embed(hidden[:, 0], head, temperature=warm[:, None]), by_row)  # [B, 1], as it divides logits [B, V]
    both = soft_embed(hidden, head, temperature=warm[:, None])
    same(soft_embed(hidden, head, temperature=warm[:, None, None]), both)
    seeds = torch.arange(6).reshape(3, 2)
    same(soft_embed(hidden, head, gumbel_seed=seeds.int()), soft_embed(hidden, head, gumbel_seed=seeds))
    same(soft_embed(hidden, head, gumbel_seed=7, noise_scale=0.0), plain)
    same(top_tokens(hidden, head, 3, softcap=0)[1], top_tokens(hidden, head, 3)[1])


@pytest.mark.parametrize("embed", [torch.float32, torch.float16])
def test_a_table_and_a_bias_of_another_dtype(embed: torch.dtype) -> None:
    """Nothing is rounded to the head's dtype: as accurate as where all have its dtype, which is the result's."""
    tensors = random_inputs(embed=7, bias=True, dtype=torch.bfloat16)
    tensors["embed_weight"] = random_inputs(embed=7, seed=1)["embed_weight"].to(embed)
    tensors["bias"] = random_inputs(bias=True, seed=1)["bias"].to(torch.float32)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    out, truth = soft_embed(**leaves, out_dtype=torch.float32), soft_embed_reference(**exact)[0]
    torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-5)
    upstream = torch.randn(11, 7)
    ours = torch.autograd.grad(out, list(leaves.values()), upstream)
    for got, want, leaf in zip(
        ours, torch.autograd.grad(truth, list(exact.values()), upstream), tensors.values(), strict=True
    ):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(
            got, want.to(leaf.dtype), rtol=1e-2 if leaf.dtype == torch.bfloat16 else 1e-3, atol=1e-4
        )
    assert soft_embed(**leaves).dtype == torch.bfloat16


@pytest.mark.parametrize("hard", [False, True])
def test_the_result_in_float32(hard: bool) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in random_inputs(dtype=torch.bfloat16).items()}
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    out, exact = soft_embed(**tensors, hard=hard, out_dtype=torch.float32), soft_embed(**wide, hard=hard)
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    out[:] = out * 2  # backward does not read it
    upstream = torch.randn(11, 9)
    got = torch.autograd.grad(out, list(tensors.values()), upstream)
    want = torch.autograd.grad(exact, list(wide.values()), 2 * upstream)
    torch.testing.assert_close(got, tuple(grad.bfloat16() for grad in want), rtol=1e-2, atol=1e-3)


def test_scales_that_are_tensors_round_nothing_twice() -> None:
    """bfloat16: no further from the truth than with numbers."""
    tensors = random_inputs(embed=6, dtype=torch.bfloat16)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    numbers = {"logit_scale": 1.296875, "embed_scale": 5.65625}
    scales = {name: torch.tensor(number, dtype=torch.bfloat16, requires_grad=True) for name, number in numbers.items()}
    truth, _ = soft_embed_reference(**exact, **numbers)
    ours, plain = soft_embed(**tensors, **scales), soft_embed(**tensors, **numbers)
    assert ours.dtype == torch.bfloat16
    assert rms([ours.double() - truth]) <= 1.05 * rms([plain.double() - truth])
    assert all(grad.dtype == torch.bfloat16 for grad in torch.autograd.grad(ours.sum(), list(scales.values())))


def test_a_row_of_which_everything_is_banned_is_nan_alone() -> None:
    tensors = random_inputs((ROWS,), VOCAB, dtype=torch.float32)
    allowed = torch.rand(ROWS, VOCAB) < 0.5
    allowed[2] = False
    for rules in ({}, {"top_k": 5}, {"top_p": 0.9}, {"gumbel_seed": 3, "hard": True}):
        options: dict[str, Any] = {"token_bitmask": packed(allowed), **rules}
        out = soft_embed(**tensors, **options)
        assert out.isnan().any(1).tolist() == [row == 2 for row in range(ROWS)]
        others = torch.arange(ROWS) != 2
        rest = {"hidden": tensors["hidden"][others], "head_weight": tensors["head_weight"]}
        options["token_bitmask"] = options["token_bitmask"][others]
        torch.testing.assert_close(out[others], soft_embed(**rest, **options))


def everything() -> tuple[dict[str, Tensor], dict[str, Any]]:
    options = {
        n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in CASES["everything"].items()
    }
    return random_inputs((ROWS,), VOCAB, 9, 7, bias=True, dtype=torch.float32), options


def of_rows(hidden: Tensor, rest: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    options = dict(options)
    pair = options.pop("ids"), options.pop("values")
    return soft_embed(hidden, **rest, **options, logit_bias=pair)


def test_every_option_compiled_batched_and_under_autocast() -> None:
    tensors, options = everything()
    hidden = tensors.pop("hidden")
    eager = of_rows(hidden, tensors, options)
    compiled = torch.compile(of_rows, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, tensors, options), eager)
    by_row = {n: v for n, v in options.items() if isinstance(v, Tensor)}
    rest = {n: v for n, v in options.items() if n not in by_row}

    def one(hidden: Tensor, row: dict[str, Tensor]) -> Tensor:
        return of_rows(hidden[None], tensors, {**rest, **{n: v[None] for n, v in row.items()}})[0]

    torch.testing.assert_close(torch.vmap(one)(hidden, by_row), eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = of_rows(hidden, tensors, options)
    low = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert torch.equal(cast, of_rows(hidden.bfloat16(), low, options))
