"""Residual addition and RMSNorm in one kernel and, with the last one of a decode step, the end of that step.

For each row of x [T, D], in float32, rounded where it is written::

    x   = x + delta                                  or  x + norm(delta, delta_weight)
    out = norm(x, weight),  norm(v, w) = v / sqrt(mean(v^2) + eps) * (offset + w)

The norm is that of the rounded x, which the next block reads. One program holds one row. Traffic, s bytes per element:
4 s T D (x and delta read, x and out written) and the weights once for each row, from L2.

`finish_step` also writes row r's result to states[r, step[r]] and adds 1 to position[r] and step[r]. Each row owns its
counters, so no program reads what another one writes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..launching import dependent
from ..plan import Config
from .checks import check, check_first
from .dependent import wait_for_kernel_before


@triton.jit
def rms_normed(x, weight, width, eps, offset):
    """x [BLOCK_D] float32, zeros behind the width."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * (weight + offset)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [T, D], in and out
    delta_ptr,  # [T, D]; None: nothing is added
    weight_ptr,  # [D]
    delta_weight_ptr,  # [D]; None: delta is added as it is
    out_ptr,  # [T, D], out
    states_ptr,  # [T, K, D], out; None: this is not the end of a step, and there are no counters
    position_ptr,  # [T] int64, in and out; the same for step
    step_ptr,
    width,
    stride_x,
    stride_delta,
    stride_out,
    stride_states_t,
    stride_states_k,
    eps,
    offset,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_d = d < width
    weight = tl.load(weight_ptr + d, mask=m_d, other=0.0).to(tl.float32)
    if delta_weight_ptr is not None:
        delta_weight = tl.load(delta_weight_ptr + d, mask=m_d, other=0.0).to(tl.float32)
    wait_for_kernel_before(DEPENDENT)
    x = tl.load(x_ptr + row * stride_x + d, mask=m_d, other=0.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row * stride_delta + d, mask=m_d, other=0.0)
        if delta_weight_ptr is not None:
            delta = rms_normed(delta.to(tl.float32), delta_weight, width, eps, offset).to(x.dtype)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + row * stride_x + d, x, mask=m_d)
    normed = rms_normed(x.to(tl.float32), weight, width, eps, offset).to(x.dtype)
    tl.store(out_ptr + row * stride_out + d, normed, mask=m_d)
    if states_ptr is not None:
        position = tl.load(position_ptr + row)
        step = tl.load(step_ptr + row)
        tl.debug_barrier()  # every thread has read the counters before one of them is written
        tl.store(states_ptr + row * stride_states_t + step * stride_states_k + d, normed, mask=m_d)
        tl.store(position_ptr + row, position + 1)
        tl.store(step_ptr + row, step + 1)


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    offset: float,
    delta_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds the output of a block to the residual stream, in place, and normalises the sum for the next block.

    Args:
        x: [T, D] float16, bfloat16 or float32, changed: x + delta, or x + norm(delta, delta_weight).
        delta: [T, D] in the dtype of x; None: nothing is added.
        weight: [D] of any float dtype. The norm scales by offset + weight; the offset is 1 in Gemma and 0 elsewhere.
        eps: of both norms.
        delta_weight: [D], of a norm of the block's output (Gemma 2 and 3), with the same eps and offset.
        out: [T, D], for the result; None: a new tensor.

    Returns:
        [T, D] in the dtype of x, the norm of x.

    Raises:
        TypeError, ValueError: a tensor does not fit. Columns must lie side by side (last stride 1).
    """
    return _launch(x, delta, weight, delta_weight, out, None, eps, offset)


def finish_step(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    states: Tensor,
    position: Tensor,
    step: Tensor,
    *,
    eps: float,
    offset: float,
    delta_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`add_rms_norm` with the final norm, whose result is also kept, and the counters of every row.

    Args:
        states: [R, K, D], changed: states[r, step[r]] becomes the result of row r. step[r] is below K.
        position, step: [R] int64, contiguous, changed: both go up by 1.
        x, delta, weight, eps, offset, delta_weight, out: as for `add_rms_norm`, of R tokens.

    Returns:
        [R, D], the hidden states.
    """
    check("states", states, (len(x), None, x.shape[-1]), x)
    for name, counter in (("position", position), ("step", step)):
        check(name, counter, (len(x),), x, dtype=torch.int64)
    return _launch(x, delta, weight, delta_weight, out, (states, position, step), eps, offset)


def _launch(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    delta_weight: Tensor | None,
    out: Tensor | None,
    end: tuple[Tensor, Tensor, Tensor] | None,
    eps: float,
    offset: float,
) -> Tensor:
    rows, width = check_first("x", x)
    check("weight", weight, (width,), x, weight.dtype)
    if delta is not None:
        check("delta", delta, (rows, width), x)
    if delta_weight is not None:
        check("delta_weight", delta_weight, (width,), x, delta_weight.dtype)
    if out is None:
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    else:
        check("out", out, (rows, width), x)
    states, position, step = end if end is not None else (None, None, None)
    config = row_config(width, dependent(x.device))
    if rows:
        launching.launch(
            add_rms_norm_kernel,
            (rows,),
            (
                x, delta, weight, delta_weight, out, states, position, step,
                width, x.stride(0), 0 if delta is None else delta.stride(0), out.stride(0),
                *((0, 0) if states is None else states.stride()[:2]), eps, offset,
            ),
            config,
            DEPENDENT=config.dependent,
        )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def row_config(width: int, dependent: bool) -> Config:
    """A whole row for each program: 8 elements a thread, one load of 16 bytes in half precision, up to 2,048 columns,
    16 beyond."""
    block = max(32, 1 << (width - 1).bit_length())
    return Config({"BLOCK_D": block}, max(1, min(8, block // 256), block // 512), 1, dependent=dependent)
