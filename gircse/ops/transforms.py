"""How an op meets what PyTorch does to calls: `torch.compile`, `torch.vmap`, dispatch modes, tensor subclasses.

`eager` says whether an op may run directly, without the dispatcher. `fold`, `unfold` and `loop` are the rules of `vmap`
for ops over rows: a batch of rows is more rows, and tensors that are not rows are taken one element after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from . import observers
from .tiles_torch import accumulation_dtype


def eager(tensors: Sequence[Tensor | None], backend: str | None) -> bool:
    """Whether nothing but eager PyTorch sees this call."""
    return not torch.compiler.is_compiling() and not observers.transformed() and alone(tensors, backend)


def alone(tensors: Sequence[Tensor | None], backend: str | None) -> bool:
    """Whether no tensor subclass and no dispatch mode is to see this call. The caller asks about transforms."""
    # the torch backend is made of PyTorch's own operators, which a dispatch mode may see one by one
    return observers.unobserved(tensors) and (backend == "torch" or not observers.dispatched())


def rows_of_numbers(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """Temperature and factor of the noise as tensors: a compiler would take a number for a constant and compile again
    for the next one."""
    ones = torch.ones(inputs.num_rows, dtype=accumulation_dtype(inputs.hidden.dtype), device=inputs.hidden.device)
    if inputs.temperature is None and options.temperature != 1.0:
        inputs = inputs._replace(temperature=ones * options.temperature)
    if inputs.noise_scale is None and options.noise_scale != 1.0:
        inputs = inputs._replace(noise_scale=ones * options.noise_scale)
    return inputs, options._replace(temperature=1.0, noise_scale=1.0)


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


def rows_or_loop(
    op: Any, matrices: Sequence[int], tensors: int, batch: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """A batch of rows is more rows; a batch of what all rows share is a loop.

    Args:
        matrices: which of the arguments all rows share. tensors: how many of them are tensors, the first.
    """
    if any(in_dims[i] is not None for i in matrices):
        return loop(op, batch, in_dims, arguments)
    folded = [
        tensor if i in matrices else fold(tensor, dim, batch)
        for i, (tensor, dim) in enumerate(zip(arguments[:tensors], in_dims, strict=False))
    ]
    return unfold(op(*folded, *arguments[tensors:]), batch)


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
