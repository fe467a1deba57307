"""How every kernel is started, and what all launchers pass: tensors, scalars, compile-time switches."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .one_pass import one_pass_kernel
from .plan import Config, Device

INTERPRETED = not hasattr(one_pass_kernel, "cache_key")  # TRITON_INTERPRET=1 was set when this was imported
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Options(NamedTuple):
    """The scalar parameters."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    seed: int | None = None  # one for all rows
    vocab_start: int = 0  # first vocabulary index of this shard, for the noise
    logit_temperature: float = 1.0  # divides the capped logits before noise and temperature


class Inputs(NamedTuple):
    """The tensors of the forward."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    embed: Tensor | None = None  # [V, E]; None: head
    bias: Tensor | None = None  # [V]
    temperature: Tensor | None = None  # [T], instead of the scalar
    seeds: Tensor | None = None  # [T] int64, instead of the scalar
    floor: Tensor | None = None  # [T] float32, the lowest score without noise that a row keeps


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
    return {
        "HAS_BIAS": inputs.bias is not None,
        "HAS_TEMPERATURE": inputs.temperature is not None,
        "CAPPED": options.softcap is not None,
        "GUMBEL": 2 if inputs.seeds is not None else 1 if options.seed is not None else 0,
        "FLOOR": inputs.floor is not None,
        "ALIGNED": options.vocab_start % 4 == 0,
        "PRECISION": _precision(inputs.hidden.dtype),
    }


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32x3"
    return "widen" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def score_scalars(options: Options) -> tuple[int, float, float, float]:
    """seed, scale, softcap, 1 / temperature, as `numerics.scores` wants them."""
    cap, before = options.softcap, options.logit_temperature
    scale = options.logit_scale / before if cap is None else options.logit_scale / cap
    return options.seed or 0, scale, (cap or 0.0) / before, 1.0 / options.temperature


def bias_stride(inputs: Inputs) -> int:
    return 0 if inputs.bias is None else inputs.bias.stride(0)
