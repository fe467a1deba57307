"""Pooling of the generated steps into one embedding per number of steps (docs/method.md §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_choice, check_dense, check_floating

POOLINGS = ("mean", "last", "weighted")


def pool_steps(steps: Tensor, pooling: str = "mean") -> Tensor:
    """Embeddings after 1..K steps, not normalised.

    ``mean``: ``z_k = (g_1 + ... + g_k) / k``; ``last``: ``z_k = g_k``; ``weighted``: ``z_k = sum_i i * g_i / (1 + ...
    + k)``.

    Args:
        steps: [..., K, D], the decoder's hidden states ``g_1..g_K`` at the generated positions, any floating-point
            dtype.
        pooling: "mean", "last" or "weighted".

    Returns:
        [..., K, D], float32 (float64 for float64 steps), differentiable. Entry k depends on the first k steps only,
        so it equals what a run of k steps would give.

    Raises:
        ValueError: unknown pooling, or fewer than two dimensions. TypeError: steps is not a floating-point tensor.
    """
    check_pooling(pooling)
    if not isinstance(steps, Tensor) or not steps.is_floating_point():
        raise TypeError(f"steps: got {getattr(steps, 'dtype', type(steps).__name__)}, expected a floating-point tensor")
    check_dense("steps", steps)
    if steps.dim() < 2:
        raise ValueError(f"steps: got shape {tuple(steps.shape)}, expected [..., K, D]")
    values = steps.to(torch.float64 if steps.dtype == torch.float64 else torch.float32)
    if pooling == "last":
        return values
    ordinal = torch.arange(1, steps.shape[-2] + 1, dtype=values.dtype, device=values.device)[:, None]
    if pooling == "mean":
        return values.cumsum(-2) / ordinal
    return (values * ordinal).cumsum(-2) / (ordinal * (ordinal + 1) / 2)


def l2_normalize(vectors: Tensor) -> Tensor:
    """``vectors / |vectors|`` over the last dimension; a zero vector stays zero, with a zero gradient.

    Unlike ``x / max(|x|, eps)``, whose gradient at zero is ``1 / eps``. Squares that leave the dtype's range do not
    matter: the vectors are first divided by the power of two next to their largest entry, which rounds nothing.

    Args:
        vectors: [..., D], float32, float64, bfloat16 or float16.

    Returns:
        [..., D] in the dtype of vectors, differentiable.

    Raises:
        TypeError: vectors is no tensor of such a dtype. ValueError: it has no dimension.
    """
    check_floating("vectors", vectors)
    if vectors.dim() == 0:
        raise ValueError("vectors: got a 0-dimensional tensor, expected [..., D]")
    if vectors.shape[-1] == 0:
        return vectors
    vectors = vectors / power_of_two(vectors.detach().abs().amax(-1, keepdim=True))
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    positive = norm > 0
    # The inner `where` keeps 1 / 0 out of the backward pass, where its inf times the outer mask's 0 would be NaN.
    return vectors * torch.where(positive, torch.where(positive, norm, 1.0).reciprocal(), 0.0)


def power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below each size >= 0 (within the normal numbers); 1 for 0, inf and NaN."""
    info = torch.finfo(size.dtype)
    exponent = torch.frexp(size.clamp(info.tiny, info.max)).exponent - 1
    return torch.where((size > 0) & (size <= info.max), torch.ldexp(torch.ones_like(size), exponent), 1.0)


def check_pooling(pooling: str) -> None:
    """``pooling`` must be a known name."""
    check_choice("pooling", pooling, POOLINGS)
