"""Which device a user means."""

from __future__ import annotations

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
