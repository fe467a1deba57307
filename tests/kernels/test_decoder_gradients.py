"""The norm's gradient, the gate and its gradient in Triton's interpreter against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gircse_kernels import decoder
from torch import Tensor

from gircse.engine.body import plain

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The result and the inputs' gradients by autograd in that dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype))]


def check(ours: list[Tensor], function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    """At most twice as far from float64 as autograd in the same dtype, and a rounding."""
    baseline, exact = (gradients(function, inputs, grad, dtype) for dtype in (grad.dtype, torch.float64))
    for found, plain_, expected in zip(ours, baseline, exact, strict=True):
        eps = torch.finfo(grad.dtype).eps
        allowed = 2 * (plain_.double() - expected).abs().max() + eps * expected.abs().max()
        assert (found.double() - expected).abs().max() <= allowed


@DTYPES
@pytest.mark.parametrize(("width", "offset"), [(32, 0.0), (200, 1.0)])
def test_norm(width: int, offset: float, dtype: torch.dtype) -> None:
    x, grad, weight = torch.randn(3, width + 8)[:, :width].to(dtype), torch.randn(3, width).to(dtype), torch.rand(width)
    options = {"eps": 1e-3, "offset": offset}
    ours = [decoder.add_rms_norm(x, None, weight, **options), decoder.norm_grad(x, grad, weight, **options)]
    check(ours, lambda x: plain.rms_norm(x, weight, **options).to(x.dtype), [x], grad)


@DTYPES
@pytest.mark.parametrize("activation", decoder.ACTIVATIONS)
def test_gate(activation: str, dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(3, 1100)).to(dtype), torch.randn(3, 2200).to(dtype)[:, 1100:]
    grad = torch.randn(3, 1100).to(dtype)
    ours = [decoder.gated_pair(gate, up, activation), *decoder.gate_grad(gate, up, grad, activation)]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return plain.ACTIVATIONS[activation](gate) * up

    check(ours, gated, [gate, up], grad)


def test_gate_at_large_arguments() -> None:
    gate = torch.tensor([[-100.0, -30.0, 0.0, 30.0, 100.0]])
    for activation in decoder.ACTIVATIONS:
        found = decoder.gate_grad(gate, torch.ones_like(gate), torch.ones_like(gate), activation)
        torch.testing.assert_close(found[0], torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]), atol=1e-6, rtol=0)


@DTYPES
@pytest.mark.parametrize(("heads", "width", "tables"), [(3, 16, 2), (5, 24, 1)])
def test_rotate(heads: int, width: int, tables: int, dtype: torch.dtype) -> None:
    """Cosines and sines of one row for all rows or of each row, whose halves differ."""
    x = torch.randn(2, 3, heads, width).to(dtype).transpose(1, 2)
    grad = torch.randn(2, heads, 3, width).to(dtype)
    cos, sin = torch.randn(2, tables, 3, width).to(dtype)
    ours = [decoder.rotate(x, cos, sin), decoder.rotate(grad, cos, sin, backward=True)]
    assert ours[0].is_contiguous()
    assert ours[1].transpose(1, 2).is_contiguous()

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * cos[:, None].to(x.dtype) + half * sin[:, None].to(x.dtype)

    check(ours, rotated, [x], grad)


def test_no_tokens_and_wrong_arguments() -> None:
    empty, some = torch.zeros(0, 8), torch.zeros(2, 8)
    assert decoder.norm_grad(empty, empty, torch.ones(8), eps=1e-6, offset=0.0).shape == (0, 8)
    assert decoder.gated_pair(empty, empty, "silu").shape == (0, 8)
    with pytest.raises(ValueError, match="activation: got 'relu', expected one of silu, gelu"):
        decoder.gated_pair(some, some, "relu")
    with pytest.raises(ValueError, match=r"up: got shape \[2, 4\], expected \[2, 8\]"):
        decoder.gated_pair(some, some[:, :4], "silu")
    with pytest.raises(ValueError, match=r"sin: got shape \[1, 3, 4\], expected \[1 or 1, 2, 4\]"):
        decoder.rotate(torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
    with pytest.raises(TypeError, match="grad: got torch.float16, expected torch.float32"):
        decoder.norm_grad(some, some.half(), torch.ones(8), eps=1e-6, offset=0.0)
