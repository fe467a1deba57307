"""Arguments of the decoder's launchers: what does not fit raises here instead of being read or written past its end."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launching import DTYPES


def check(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Holds a tensor to a shape (None: any size), a dtype (None: that of `like`) and the device of `like`, and its
    columns to lie side by side.

    Raises:
        TypeError: the dtype. ValueError: shape, device or last stride.
    """
    dtype = like.dtype if dtype is None else dtype
    sizes = tuple(tensor.shape)
    if sizes == shape and tensor.dtype == dtype and tensor.stride(-1) == 1 and tensor.device == like.device:
        return  # for the host's sake, which a short prefill waits for
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    if len(sizes) != len(shape) or any(n not in (None, m) for n, m in zip(shape, sizes, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {list(sizes)}, expected [{expected}]")
    if sizes[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected 1 as the last one")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {like.device}")


def check_first(name: str, tensor: Tensor) -> tuple[int, int]:
    """Holds the tensor that others are held to to two dimensions and a dtype that the kernels take. -> its shape."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: got {tensor.dtype}, expected float16, bfloat16 or float32")
    rows, columns = tensor.shape if tensor.dim() == 2 else (None, None)
    check(name, tensor, (rows, columns), tensor)
    assert rows is not None
    assert columns is not None
    return rows, columns
