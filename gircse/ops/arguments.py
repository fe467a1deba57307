"""Checks of arguments that the ops over a vocabulary share. Errors say what came and what was expected."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import observers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, value: object) -> None:
    """``value`` must be an ordinary tensor of a dtype that the backends compute."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if type(value) is not Tensor and type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: got a DTensor with placements {value.placements}, expected a plain tensor: "  # type: ignore[attr-defined]
            "use it inside the forward of the module that FSDP shards, or pass "
            '.full_tensor(grad_placements=[Partial("avg")]), whose gradient is the mean over ranks as in FSDP (without '
            "grad_placements each rank would keep its own), or this rank's rows of the matrices with vocab_parallel="
        )
    kind = quantised(value)
    if kind is not None:
        raise TypeError(f"{name}: got {kind}, expected a plain tensor: {KEEP_PLAIN}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    check_dense(name, value)


KEEP_PLAIN = (
    'keep it out of the quantisation (modules_to_not_convert=["lm_head"]; bitsandbytes: llm_int8_skip_modules), or '
    "dequantize it once and pass that matrix"
)


def quantised(value: Tensor) -> str | None:
    """What a quantised tensor of torchao or bitsandbytes is called; None for any other tensor.

    Those of torchao say that they are bfloat16, those of bitsandbytes hold packed bytes in another shape.
    """
    if type(value) is Tensor or type(value) is torch.nn.Parameter:
        return None
    library = type(value).__module__.split(".")[0]
    return f"a quantised {type(value).__name__} of {library}" if library in ("torchao", "bitsandbytes") else None


def check_dense(name: str, value: Tensor) -> None:
    """Not a sparse tensor."""
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense tensor")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """``value`` must be one of the names."""
    if not isinstance(value, str) or value not in known:  # what is no string may not even compare
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, known))}")


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """``value`` must be a finite real number, above 0 if ``positive``."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction past the largest float
        raise ValueError(f"{name}: got a number past {sys.float_info.max:g}, expected a finite one") from None
    if not -math.inf < number < math.inf or (positive and number <= 0):  # math.isfinite cannot be compiled
        raise ValueError(f"{name}: got {value}, expected a finite number{' above 0' if positive else ''}")
    return number


def check_like(
    name: str, value: Tensor, other_name: str, other: Tensor, cast: torch.dtype | None = None, *, mixed: bool = False
) -> None:
    """The same device, and the same dtype once all but float64 tensors are cast to ``cast``; if ``mixed``, any dtypes
    that are computed in one."""
    free = mixed or cast is not None
    if value.dtype != other.dtype and (not free or torch.float64 in (value.dtype, other.dtype)):
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {other.dtype}, the dtype of {other_name}")
    if value.device != other.device:
        raise ValueError(f"{name}: got device {value.device}, expected {other.device}, the device of {other_name}")


def has_no_values(tensor: Tensor) -> bool:
    """Whether the tensor stands for values not yet known: compilation, fake tensors, functional transforms."""
    return torch.compiler.is_compiling() or observers.transformed() or not observers.unobserved((tensor,))


def row_values(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    """A tensor with one value for each row of hidden, or that broadcasts to it, as one for each row, [T].

    Dimensions of size 1 may be left out: [B] fits hidden [B, 1, D]. A last dimension of size 1 may stand for hidden's
    own, as where the tensor divides logits [..., V].
    """
    if value.dim() == hidden.dim() > 1 and value.shape[-1] == 1:
        value = value[..., 0]
    if value.device != hidden.device:
        raise ValueError(f"{name}: got device {value.device}, expected {hidden.device}, the device of the rows")
    leading = hidden.shape[:-1]
    try:
        fits = torch.broadcast_shapes(value.shape, leading) == leading
    except RuntimeError:
        fits = False
    if fits:
        return value.broadcast_to(leading).reshape(-1).contiguous()
    if [n for n in value.shape if n != 1] == [n for n in leading if n != 1]:
        return value.reshape(-1).contiguous()
    raise ValueError(
        f"{name}: got shape {tuple(value.shape)}, expected one broadcastable to {tuple(leading)}, "
        "the leading dimensions of the rows"
    )


def row_vectors(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    """A tensor with a vector for each row of hidden, or that broadcasts to it, as [T, n]."""
    if value.device != hidden.device:
        raise ValueError(f"{name}: got device {value.device}, expected {hidden.device}, the device of the rows")
    leading, count = hidden.shape[:-1], value.shape[-1]
    try:
        if torch.broadcast_shapes(value.shape[:-1], leading) == leading:
            return value.broadcast_to(*leading, count).reshape(-1, count)
    except RuntimeError:
        pass
    if value.dim() == 2 and value.shape[0] == leading.numel():
        return value
    raise ValueError(
        f"{name}: got shape {tuple(value.shape)}, expected leading dimensions broadcastable to {tuple(leading)}, those "
        "of the rows"
    )
