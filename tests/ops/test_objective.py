"""icr_objective against its definition, and what its docstring claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gircse.ops import icr_objective
from gircse.ops.info_nce_reference import icr_objective_reference


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("reg_weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_definition_and_gradient(steps: int, reg_weight: float, reduction: str) -> None:
    losses = (torch.rand(steps, dtype=torch.float64) + 0.1).requires_grad_()
    ours = icr_objective(losses, reg_weight=reg_weight, reduction=reduction)
    exact = icr_objective_reference(losses, reg_weight=reg_weight, reduction=reduction)
    torch.testing.assert_close(ours, exact, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, losses), torch.autograd.grad(exact, losses), rtol=1e-13, atol=1e-15
    )
    assert ours.shape == ()
    assert ours.dtype == torch.float64


def test_gradcheck() -> None:
    losses = torch.tensor([0.5, 0.9, 0.4, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: icr_objective(x, reg_weight=0.7), losses)


def test_by_hand() -> None:
    """L = (1, 2, 1): mean 4/3, one step gets worse by log 2, of two pairs."""
    losses = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    expected = 4 / 3 + 3.0 * torch.tensor(2.0, dtype=torch.float64).log() / 2
    torch.testing.assert_close(icr_objective(losses, reg_weight=3.0, eps=1e-300), expected, rtol=1e-14, atol=0.0)


def test_sum_makes_the_weight_k_times_weaker() -> None:
    losses = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(
        icr_objective(losses, reg_weight=5 * 0.3, reduction="sum"), 5 * icr_objective(losses, reg_weight=0.3)
    )


def test_penalty_pushes_the_earlier_loss_up() -> None:
    losses = torch.tensor([0.1, 1.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(icr_objective(losses), losses)
    assert grad[0] < 0 < grad[1]


def test_zero_losses_are_finite() -> None:
    losses = torch.zeros(3, requires_grad=True)
    objective = icr_objective(losses)
    (grad,) = torch.autograd.grad(objective, losses)
    assert objective == 0
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, r"losses: got list, expected a floating-point tensor"),
        (torch.ones(2, dtype=torch.int64), {}, TypeError, r"losses: got torch.int64, expected a floating-point tensor"),
        (torch.ones(2, 2), {}, ValueError, r"losses: got shape \(2, 2\), expected \[K\]"),
        (torch.ones(0), {}, ValueError, r"losses: got shape \(0,\), expected \[K\] with K of at least 1"),
        (torch.ones(2), {"reg_weight": -1.0}, ValueError, r"reg_weight: got -1.0"),
        (torch.ones(2), {"eps": 0.0}, ValueError, r"eps: got 0.0"),
        (torch.ones(2), {"reduction": "none"}, ValueError, r"reduction: got 'none', expected one of 'mean', 'sum'"),
    ],
)
def test_bad_arguments(losses: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        icr_objective(losses, **options)


def test_the_penalty_weighs_one_unless_told_otherwise() -> None:
    losses = torch.tensor([1.0, 2.0, 3.5])
    assert torch.equal(icr_objective(losses), icr_objective(losses, reg_weight=1.0))
    assert not torch.equal(icr_objective(losses), icr_objective(losses, reg_weight=2.0))
