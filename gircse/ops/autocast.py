"""Autocast, as the ops meet it: its dtype, and a region without it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from gircse_kernels.contract import Inputs
from torch import Tensor

# Asked once: `torch.compile` cannot trace the question in every version of PyTorch.
_DEVICES = frozenset(name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name))
_NOTHING = nullcontext()


def autocast_dtype(tensor: object) -> torch.dtype | None:
    """The dtype to which autocast casts, if it is on for the device of this tensor."""
    if isinstance(tensor, Tensor):
        device = tensor.device.type
        if device in _DEVICES and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def no_autocast(device: str) -> Any:
    """A context in which products keep their dtypes; entering one costs, so only where there is something to leave."""
    if device in _DEVICES and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def cast_inputs(inputs: Inputs, cast: torch.dtype | None) -> Inputs:
    """Cast as a linear layer does under autocast. The op does it, so that autograd sees the originals.

    Logits that are given stay as they are: a copy of them is what the op exists to avoid.
    """
    if cast is None:
        return inputs
    names = Inputs._fields[:4] if inputs.head is not None else Inputs._fields[1:4]
    values = ((name, getattr(inputs, name)) for name in names)
    return inputs._replace(**{n: t if t is None or t.dtype == torch.float64 else t.to(cast) for n, t in values})
