"""How every kernel is started, and what all launchers pass: tensors, scalars, compile-time switches."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .contract import Inputs, Options
from .matmul import dot
from .plan import Config, Device

INTERPRETED = not hasattr(dot, "cache_key")  # TRITON_INTERPRET=1 was set when this was imported
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """Its architecture and multiprocessors; the interpreter poses as a small H100."""
    if device.type != "cuda":
        return Device(90, 4)
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, **constants: Any) -> None:
    """The one place where a kernel starts; tools that compile or count without a device replace it."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return launch(kernel, grid, arguments, config, **constants)
    kernel[grid](*arguments, **constants, **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages)


def score_flags(inputs: Inputs, options: Options) -> dict[str, Any]:
    """Compile-time switches of everything that computes scores."""
    return {"ALIGNED": options.vocab_start % 4 == 0, "PRECISION": _precision(inputs.hidden.dtype)}


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32x3"
    return "widen" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def score_scalars(inputs: Inputs, options: Options) -> tuple[int | None, float, float | None, float]:
    """seed, scale, softcap, 1 / temperature, as `scores.scores` wants them; None switches noise or soft-cap off."""
    cap, before = options.softcap, options.logit_temperature
    scale = options.logit_scale / (before if cap is None else cap)
    seed = 0 if inputs.seeds is not None else options.seed
    return seed, scale, None if cap is None else cap / before, 1.0 / options.temperature


def bias_stride(inputs: Inputs) -> int:
    return 0 if inputs.bias is None else inputs.bias.stride(0)
