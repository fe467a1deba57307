"""Which implementation of an op runs: "torch" (any device, any dtype) or "triton" (fused kernels)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)  # compute capability: Ampere

if importlib.util.find_spec("gircse_kernels") is None:  # a plain checkout on sys.path, not installed
    sys.path.append(os.path.join(os.path.dirname(__file__), "..", "..", "kernels"))


def check_backend(backend: str | None) -> None:
    """Raises ValueError for a name that is none."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """The backend for tensors like this one; None chooses triton wherever it runs and is meant to (CUDA).

    Raises:
        ValueError: not a backend's name.
        RuntimeError: triton was asked for and cannot take this tensor.
    """
    if backend == "torch" or (backend is None and not tensor.is_cuda):
        return "torch"
    check_backend(backend)
    reason = refusal(tensor.device, tensor.dtype)
    if reason is None:
        return "triton"
    if backend is None:
        if "compute capability" in reason:
            _warn_once(f"gircse: {reason}; the slower torch backend is used")
        return "torch"
    raise RuntimeError(f"backend: 'triton' is not available: {reason}; use None or 'torch'")


def kernels(name: str = "soft_embed") -> ModuleType:
    """The Triton kernels of one op, imported on first use: without CUDA nobody needs Triton."""
    return importlib.import_module(f"gircse_kernels.{name}")


@functools.lru_cache(maxsize=64)
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why triton cannot take such tensors; None: it can."""
    if dtype not in TRITON_DTYPES:
        return f"got dtype {dtype}, the kernels take {', '.join(map(str, TRITON_DTYPES))}"
    if device.type not in ("cuda", "cpu"):
        return f"got device {device}, the kernels run on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability}, the kernels need {OLDEST}"
            )
        return None
    if not kernels().INTERPRETED:
        return "got CPU tensors, which the kernels take only if TRITON_INTERPRET=1 is set before they are imported"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
