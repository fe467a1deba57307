"""How every kernel is started, and what all launchers pass: tensors, scalars, compile-time switches."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import plan
from .contract import Inputs, Options
from .matmul import dot, product_kernel
from .plan import SMALL_SHARED, Config, Device, Problem, cdiv, lookup

INTERPRETED = not hasattr(dot, "cache_key")  # TRITON_INTERPRET=1 was set when this was imported
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """Its architecture and multiprocessors; the interpreter poses as a small H100."""
    if device.type != "cuda":
        return Device(90, 4)
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    return Device(SMALL_SHARED[0] if arch in SMALL_SHARED else arch, properties.multi_processor_count)


def dependent(device: torch.device) -> bool:
    """Whether the decoder's kernels are launched there as `decoder/dependent.py` says."""
    return plan.DEPENDENT_LAUNCH and not INTERPRETED and device_of(device).arch >= 90


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, **constants: Any) -> None:
    """Start a kernel. Every start goes through here, so that tools can record starts instead of making them.

    To find the compiled kernel, `kernel[grid](..)` examines all arguments, and the GPU has nothing to do meanwhile.
    Compiled kernels are therefore kept here, under all that Triton compiles them for, which takes half that time.

    Args:
        kernel: its compile-time parameters follow all others.
        grid: one to three numbers of programs.
        arguments: tensors, tensor descriptors, ints, floats or None in the kernel's order; the first is a tensor.
        config: tiles, warps and stages.
        constants: all other compile-time parameters.
    """
    device = arguments[0].device
    if not INTERPRETED and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            return launch(kernel, grid, arguments, config, **constants)
    for observer in _OBSERVERS:
        observer(arguments)
    if INTERPRETED:
        kernel[grid](*arguments, **constants, **config.blocks)
        return
    key = (kernel.fn, device.index, config, *constants.items(), *map(_compiled_for, arguments))
    known = _COMPILED.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants, **config.blocks, **config.options)
        constants.update(config.blocks)
        _COMPILED[key] = compiled, tuple(constants[p.name] for p in kernel.params if p.is_constexpr)
    else:
        compiled, last = known
        compiled[(*grid, 1, 1)[:3]](*arguments, *last)


@contextmanager
def telling(observer: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside, `observer` receives the arguments of every kernel that this thread starts."""
    here = threading.get_ident()

    def tell(arguments: tuple[Any, ...]) -> None:
        if threading.get_ident() == here:
            observer(arguments)

    _OBSERVERS.append(tell)
    try:
        yield
    finally:
        _OBSERVERS.remove(tell)


_OBSERVERS: list[Callable[[tuple[Any, ...]], None]] = []
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _compiled_for(argument: Any) -> Any:
    """All that Triton compiles for: dtype and alignment of a tensor; width, divisibility and oneness of an int."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return 1 if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31)
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape, argument.padding
    assert argument is None or type(argument) is float, f"a kernel's argument: {argument!r}"
    return type(argument)


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out [M, N] = a [M, K] @ b [K, N], or out += a @ b, summed in float32, by cuBLAS.

    `out` has the dtype of `a` and `b`, or float32. The products of float32 matrices are never rounded to TF32: where
    the user's settings allow cuBLAS to do that, our own kernel takes its place, in 3xTF32, and no setting is touched,
    because they belong to the whole process. Like `launch`, replaced by tools that compile or count.
    """
    if a.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        tf32x3_product(a, b, out, add=add)
    elif a.device.type == "cuda":
        dtype: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
        if add:
            torch.addmm(out, a, b, **dtype, out=out)
        else:
            torch.mm(a, b, **dtype, out=out)
    elif a.device.type != "meta":  # the interpreter
        result = a.float() @ b.float()
        if add:
            out += result
        else:
            out.copy_(result)


def batched_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out [N, M, L] = a [N, M, K] @ b [N, K, L], or out += a @ b: bfloat16, summed in float32 `out`, by cuBLAS.

    Like `launch`, replaced by tools that compile or count.
    """
    if a.device.type == "cuda":
        if add:
            torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.bmm(a, b, out_dtype=out.dtype, out=out)
    elif a.device.type != "meta":  # the interpreter
        result = a.float() @ b.float()
        if add:
            out += result
        else:
            out.copy_(result)


def tf32x3_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out [M, N] = a [M, K] @ b [K, N], or out += a @ b, float32 of any strides, by our own kernel."""
    (rows, inner), cols = a.shape, b.shape[1]
    config = lookup("matmul", device_of(a.device).arch, 4, rows)
    launch(
        product_kernel,
        (cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(cols, config.blocks["BLOCK_N"]),),
        (a, b, out, rows, cols, inner, *a.stride(), *b.stride(), *out.stride()),
        config,
        ADD=add,
        PRECISION="tf32x3",
    )


def problem_of(inputs: Inputs) -> Problem:
    """What the plan of a call depends on."""
    width, values = 0 if inputs.head is None else inputs.head.shape[1], inputs.values
    return Problem(inputs.num_rows, inputs.num_vocab, width, values.shape[1], inputs.embed is None, values.itemsize)


def exact_scores(inputs: Inputs, statistics: bool) -> bool:
    """Whether scores must stay float32 on the way to their exponential.

    bfloat16 scores are as accurate as eager PyTorch's and faster (two bytes fewer to write and to read), so form 3 and
    the backward take them where nobody reads scores themselves. Statistics and hard rows do, a threshold is compared
    with them, values are added to them, and in float16 a score beyond 65504 would become infinite.
    """
    read = inputs.threshold, inputs.bias_ids, inputs.hard
    return statistics or inputs.hidden.dtype == torch.float16 or any(tensor is not None for tensor in read)


def score_flags(inputs: Inputs, options: Options) -> dict[str, Any]:
    """Compile-time switches of everything that computes scores."""
    return {"ALIGNED": options.vocab_start % 4 == 0, "PRECISION": _precision(inputs.hidden.dtype)}


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32x3"
    return "widen" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def score_tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """bias, temperature, noise_scale, seeds, threshold, bitmask, as every kernel that makes scores takes them."""
    rows = inputs.temperature, inputs.noise_scale, inputs.seeds, inputs.threshold
    return inputs.bias, *map(adjacent, rows), _bitmask(inputs)


def adjacent(rows: Tensor | None) -> Tensor | None:
    """A number for each row as the kernels read it, beside the next row's: an expanded one lies in one place."""
    return rows if rows is None or rows.is_contiguous() else rows.contiguous()


def row_stride(matrix: Tensor) -> int:
    """The distance of rows, and where they have more than one, a number that divides all of them."""
    return matrix.stride(0) if matrix.dim() == 2 else max(1, math.gcd(*matrix.stride()[:-1]))


def score_strides(inputs: Inputs) -> tuple[int, int]:
    """Of the bias, and from row to row of the bitmask."""
    bitmask = _bitmask(inputs)
    return 0 if inputs.bias is None else inputs.bias.stride(0), 0 if bitmask is None else bitmask.stride(0)


def _bitmask(inputs: Inputs) -> Tensor | None:
    bitmask = inputs.bitmask
    return bitmask if bitmask is None or bitmask.stride(1) == 1 else bitmask.contiguous()


def score_scalars(inputs: Inputs, options: Options) -> tuple[int | None, float, float | None, float, float]:
    """seed, scale, softcap, 1 / temperature, noise_scale, as `scores.scores` wants them; None: not wanted."""
    seed, cap = 0 if inputs.seeds is not None else options.seed, options.softcap
    scale = options.logit_scale if cap is None else options.logit_scale / cap
    return seed, scale, cap, 1.0 / options.temperature, options.noise_scale


def logit_offsets(inputs: Inputs) -> Tensor | None:
    """Where the rows of given logits begin, [T] int64 elements; None: `row_stride` apart."""
    hidden = inputs.hidden
    if hidden.dim() == 2:
        return None
    places = inputs.places
    if places is None:
        places = torch.arange(inputs.num_rows, device=hidden.device)
    index = inputs.index_of(places)
    return sum((i * stride for i, stride in zip(index, hidden.stride(), strict=False)), torch.zeros_like(places))
