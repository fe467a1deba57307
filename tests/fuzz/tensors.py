"""Tensors of every layout, and values that are no tensors of use: what the fuzzing of the ops draws from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
seeds = st.integers(0, 2**31)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout ("expanded": those of the first row in all rows, with a stride of 0)."""
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "offset":
        flat = values.new_full((values.numel() + 3,), float("nan"))
        flat[3:] = values.reshape(-1)
        return flat[3:].view(values.shape)
    if layout == "expanded" and values.dim() > 1 and values.shape[0]:
        return values[:1].expand(values.shape)
    return values


def normal(shape: Sequence[int], seed: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def draw_tensor(draw: Any, shape: Sequence[int], dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    return laid_out(normal(shape, draw(seeds), scale=scale, dtype=dtype), draw(st.sampled_from(LAYOUTS)))


# Made anew at each draw, so that no example sees what another one did to it.
_GARBAGE = {
    "none": lambda: None,
    "text": lambda: "2",
    "bytes": lambda: b"2",
    "true": lambda: True,
    "zero": lambda: 0,
    "negative": lambda: -1,
    "negative float": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "past float": lambda: 10**400,
    "past int64": lambda: 2**63,
    "complex": lambda: 1j,
    "list": lambda: [1.0, 2.0],
    "dict": lambda: {"a": 1},
    "object": object,
    "array": lambda: np.ones((3, 4), np.float32),
    "0-d": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0),
    "no columns": lambda: torch.zeros(3, 0),
    "4-d": lambda: torch.zeros(1, 2, 3, 4),
    "integers": lambda: torch.ones(3, 4, dtype=torch.int64),
    "bools": lambda: torch.ones(3, 4, dtype=torch.bool),
    "complex tensor": lambda: torch.ones(3, 4, dtype=torch.complex64),
    "float8": lambda: torch.ones(3, 4).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(3, 4, device="meta"),
    "meta scalar": lambda: torch.ones((), device="meta"),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "negative tensor": lambda: torch.tensor([-1.0, 1.0, 1.0]),
    "nan tensor": lambda: torch.tensor([float("nan"), 1.0, 1.0]),
    "long": lambda: torch.ones(10_000),
}
garbage = st.sampled_from(sorted(_GARBAGE)).map(lambda name: _GARBAGE[name]())
