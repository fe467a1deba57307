"""soft_embed under autocast: it casts as a linear layer does."""

from __future__ import annotations

import torch
from torch import Tensor

from gircse.ops import soft_embed
from tests.ops.accuracy import random_inputs


def test_autocast_casts_like_a_linear_layer() -> None:
    tensors = random_inputs(embed=6, bias=True, dtype=torch.float32)
    hidden = tensors["hidden"].bfloat16().requires_grad_()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name != "hidden"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = soft_embed(hidden, **leaves)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        assert out.dtype == torch.bfloat16
        # Backward inside the region too: its float32 products must not be autocast.
        inside = torch.autograd.grad(out, [hidden, *leaves.values()], torch.ones_like(out), retain_graph=True)
    outside = torch.autograd.grad(out, [hidden, *leaves.values()], torch.ones_like(out))
    plain = soft_embed(hidden, **{name: tensor.bfloat16() for name, tensor in leaves.items()})  # type: ignore[arg-type]
    assert torch.equal(out, plain)  # type: ignore[arg-type]
    assert [grad.dtype for grad in outside] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_autocast_of_one_matrix_given_twice() -> None:
    """It stays one matrix: bitwise what the head alone gives, with one cast and one gradient."""
    tensors = random_inputs(bias=True, dtype=torch.float32)
    results = []
    for twice in (False, True):
        head = tensors["head_weight"].clone().requires_grad_()
        embed = {"embed_weight": head} if twice else {}
        with torch.autocast("cpu", torch.bfloat16):
            out = soft_embed(tensors["hidden"], head, **embed, bias=tensors["bias"])
        assert isinstance(out, Tensor)
        results.append((out, *torch.autograd.grad(out.sum(), head)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    tensors = random_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = soft_embed(**tensors)  # type: ignore[arg-type]
    assert torch.equal(out, soft_embed(**tensors))  # type: ignore[arg-type]
