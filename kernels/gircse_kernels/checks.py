"""Arguments of the decoder's launchers: what does not fit raises here instead of being read or written past its end."""

from __future__ import annotations

import torch
from torch import Tensor

from .launching import DTYPES


def check(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Holds a tensor to a shape (None: any size), a dtype (None: that of `like`) and the device of `like`, and its
    columns to lie side by side.

    Raises:
        TypeError: the dtype. ValueError: shape, device or last stride.
    """
    dtype = like.dtype if dtype is None else dtype
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    if tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{expected}]")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected 1 as the last one")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {like.device}")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a dtype that no kernel takes."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: got {tensor.dtype}, expected float16, bfloat16 or float32")
