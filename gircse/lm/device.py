"""The device that a user names, and computing in the weights' own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def to_device(device: str | torch.device | None, name: str = "device") -> torch.device:
    """The device that an argument `name` gives; None: CUDA if there is one, else the CPU.

    Raises:
        ValueError: PyTorch knows no such device.
    """
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ValueError(f"{name}: got {device!r}, expected None or a device such as 'cuda:0' or 'cpu'") from None


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Switches the caller's autocast off, for the device and for the CPU. So the result does not depend on it, and no
    tensor that is kept comes out in half precision because of it."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield
