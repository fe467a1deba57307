"""Rules of `torch.vmap` for ops over rows: a batch of rows is more rows, and what is no row is met one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def fold(tensor: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """A batch of row tensors as one: [B, T, ..] -> [B * T, ..]."""
    if tensor is None:
        return None
    batched = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.reshape(-1, *batched.shape[2:]) if tensor.numel() else tensor.new_empty(0, *batched.shape[2:])


def unfold(results: Sequence[Tensor], batch: int) -> tuple[Any, Any]:
    """[B * T, ..] -> [B, T, ..], an empty stand-in included."""
    rows = [result.shape[0] // batch for result in results]
    return tuple(r.reshape(batch, n, *r.shape[1:]) for r, n in zip(results, rows, strict=True)), (0,) * len(results)


def loop(op: Any, batch: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, Any]:
    """The op for each element of the batch."""
    results = [
        op(
            *(
                a.select(d, i) if isinstance(a, Tensor) and isinstance(d, int) else a
                for a, d in zip(arguments, in_dims, strict=False)
            )
        )
        for i in range(batch)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
