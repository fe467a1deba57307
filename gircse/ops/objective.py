"""The ICR objective: stepwise losses and the penalty on steps that do not improve (docs/method.md §6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_choice, check_flag, check_number, has_no_values

REDUCTIONS = ("mean", "sum")


def icr_objective(
    losses: Tensor,
    *,
    reg_weight: float = 1.0,
    eps: float = 1e-8,
    reduction: str = "mean",
    detach_previous: bool = False,
) -> Tensor:
    """Iterative contrastive refinement (GIRCSE, arXiv 2509.24291)::

        reduce_k L_k + reg_weight * mean_{k=1..K-1} relu(log(L_{k+1} + eps) - log(L_k + eps))

    ``reduction`` applies to the first term alone: "mean" is the reference code's formula, "sum" the one that the
    paper prints. The sum is K times the mean and the penalty stays as it is, so "sum" makes ``reg_weight`` K times
    weaker against the losses: ``objective("sum", K * w) == K * objective("mean", w)``. With one step there is no
    penalty.

    The penalty is not detached: where step k + 1 is worse than step k it lowers ``L_{k+1}`` and also pushes ``L_k``
    *up*, as in the reference code. ``detach_previous`` stops that: each step is then held to a constant.

    Args:
        losses: [K], K >= 1, floating point, in nats, none below ``-eps``.
        reg_weight: weight of the penalty, >= 0.
        eps: added to each loss inside the logarithms, > 0.
        reduction: "mean" or "sum".
        detach_previous: no gradient into the earlier step of each pair of the penalty; its value stays.

    Returns:
        A scalar in the dtype of losses.

    Raises:
        TypeError: losses is not a floating-point tensor. ValueError: an argument has a wrong shape or value.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(
            f"losses: got {getattr(losses, 'dtype', type(losses).__name__)}, expected a floating-point tensor"
        )
    if losses.dim() != 1 or losses.shape[0] == 0:
        raise ValueError(f"losses: got shape {tuple(losses.shape)}, expected [K] with K of at least 1")
    if check_number("reg_weight", reg_weight) < 0:
        raise ValueError(f"reg_weight: got {reg_weight}, expected a number of at least 0")
    eps = check_number("eps", eps, positive=True)
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("detach_previous", detach_previous)
    # as elsewhere, an accelerator's values are not waited for
    if losses.device.type == "cpu" and not has_no_values(losses) and bool((losses < -eps).any()):
        raise ValueError(f"losses: got {losses.min().item()}, expected none below {-eps}")
    total = losses.mean() if reduction == "mean" else losses.sum()
    if losses.shape[0] == 1 or reg_weight == 0:
        return total
    # half precision has no number as small as eps
    logs = (losses.to(torch.promote_types(losses.dtype, torch.float32)) + eps).log()
    previous = logs[:-1].detach() if detach_previous else logs[:-1]
    return total + (reg_weight * torch.relu(logs[1:] - previous).mean()).to(total.dtype)
