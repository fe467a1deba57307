"""The gate of an MLP: activation(gate) * up, one elementwise kernel.

gate and up are the halves of a row of one product, [T, 2 I]. In float32, rounded once. Each program takes a block of
columns of one row. Traffic, s bytes per element: 3 s T I.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..launching import dependent
from ..plan import Config, cdiv
from ..scores import tanh
from .checks import check_first
from .dependent import wait_for_kernel_before

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK_I = 1024  # 8 columns for each thread of 4 warps: 16 bytes in half precision


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """float32; GELU by the error function, or by its approximation with tanh (Hendrycks and Gimpel, 2016)."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gated_kernel(
    gate_up_ptr,  # [T, 2 I]
    out_ptr,  # [T, I], out
    width,  # I
    stride_gate_up,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_column = column < width
    wait_for_kernel_before(DEPENDENT)
    p_gate = gate_up_ptr + row * stride_gate_up + column
    gate = tl.load(p_gate, mask=m_column, other=0.0).to(tl.float32)
    up = tl.load(p_gate + width, mask=m_column, other=0.0).to(tl.float32)
    out = activated(gate, ACTIVATION) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=m_column)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up.

    Args:
        gate_up: [T, 2 I] float16, bfloat16 or float32, gate then up.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [T, I], contiguous, in the same dtype.

    Raises:
        TypeError, ValueError: the tensor does not fit, or the activation is another one.
    """
    rows, double = check_first("gate_up", gate_up)
    if double % 2:
        raise ValueError(f"gate_up: got {double} columns, expected an even number")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    width = double // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        config = Config({"BLOCK_I": BLOCK_I}, 4, 1, dependent=dependent(gate_up.device))
        launching.launch(
            gated_kernel,
            (rows, cdiv(width, BLOCK_I)),
            (gate_up, out, width, gate_up.stride(0)),
            config,
            ACTIVATION=activation,
            DEPENDENT=config.dependent,
        )
    return out
