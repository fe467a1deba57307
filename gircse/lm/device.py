"""Which device a user means, and computing on it in the weights' own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def to_device(device: str | torch.device | None) -> torch.device:
    """The device; None: CUDA if there is one, else the CPU.

    Raises:
        ValueError: it is none.
    """
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ValueError(f"device: got {device!r}, expected None or a device such as 'cuda:0' or 'cpu'") from None


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """The caller's autocast does not count inside, for the device and for the CPU: what is computed here comes out the
    same with and without it, and nothing that is kept is in half precision because of it."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield
