"""The kernels by themselves, as the hub delivers them: PyTorch and Triton, nothing of the package around them.

Loaded from the repository that this folder lies in (`build/`, by Hugging Face's `kernels`), or, in a checkout, as the
import package `gircse_kernels`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def soft_embed() -> Any:
    if (REPOSITORY / "build").is_dir():
        from kernels import get_local_kernel

        return get_local_kernel(REPOSITORY).soft_embed
    import gircse_kernels

    return gircse_kernels.soft_embed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(soft_embed: Any, tied: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, head, grad = (torch.randn(n, 32, device=DEVICE).to(dtype) for n in (5, 70, 5))
    embed = None if tied else torch.randn(70, 32, device=DEVICE).to(dtype)
    inputs, options = soft_embed.Inputs(hidden, head, embed), soft_embed.Options(temperature=0.7, softcap=5.0)
    found = soft_embed.forward(inputs, options, stats=True, exact=True)
    out = found.out if found.exact is None else found.exact
    saved = soft_embed.Saved(out, found.peak, found.total, found.entropy)
    needs = soft_embed.Needs(hidden=True, head=True, embed=not tied, bias=False, temperature=False)
    grads = soft_embed.backward(grad, None, None, inputs, saved, options, needs)

    leaves = [tensor.double().requires_grad_() for tensor in (hidden, head, embed) if tensor is not None]
    scores = 5.0 * torch.tanh(leaves[0] @ leaves[1].T / 5.0) / 0.7
    expected = scores.softmax(-1) @ leaves[-1]
    exact = torch.autograd.grad(expected, leaves, grad.double())
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(found.out.double(), expected, **tolerance)
    torch.testing.assert_close(found.lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
    for ours, truth in zip((grads.hidden, grads.head, grads.embed), exact, strict=False):
        torch.testing.assert_close(ours.double(), truth, **tolerance)


def test_a_floor_removes_what_lies_below_it(soft_embed: Any) -> None:
    hidden = torch.tensor([[3.0, 2.0, 1.0, 0.0] + 28 * [-5.0]], device=DEVICE)
    threshold = torch.tensor([1.5], device=DEVICE)
    inputs = soft_embed.Inputs(hidden, torch.eye(32, device=DEVICE), threshold=threshold)
    out = soft_embed.forward(inputs, soft_embed.Options()).out
    torch.testing.assert_close(out[0, :2], torch.tensor([3.0, 2.0], device=DEVICE).softmax(0))
    assert not out[0, 2:].any()
