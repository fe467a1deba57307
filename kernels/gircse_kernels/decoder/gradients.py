"""RMSNorm's gradient, and the gate of an MLP with its gradient on separate inputs, for training with frozen norms.

For each row, in float32, rounded where it is written; g is the gradient of the result::

    norm(v) = v r w',  r = 1 / sqrt(mean(v^2) + eps),  w' = offset + w     dv = r (g w' - v r^2 mean(g w' v))
    gated   = act(gate) up                                                 dgate = g up act'(gate), dup = g act(gate)

A program of the norm holds one row, one of the gate a block of columns of one row. Traffic, s bytes per element:
3 s T D for the norm's gradient; 3 s T I for the gate and 5 s T I for its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..plan import Config, cdiv
from ..scores import tanh
from .checks import check, check_first
from .gate import ACTIVATIONS, BLOCK_I, activated
from .rms_norm import row_config


@triton.jit
def norm_grad_kernel(
    x_ptr,  # [T, D]
    grad_ptr,  # [T, D]
    weight_ptr,  # [D]
    out_ptr,  # [T, D], out
    width,
    stride_x,
    stride_grad,
    eps,
    offset,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m_d = d < width
    weight = tl.load(weight_ptr + d, mask=m_d, other=0.0).to(tl.float32) + offset
    x = tl.load(x_ptr + row * stride_x + d, mask=m_d, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * stride_grad + d, mask=m_d, other=0.0).to(tl.float32) * weight
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    out = scale * (grad - x * (scale * scale * tl.sum(grad * x, 0) / width))
    tl.store(out_ptr + row * width + d, out.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activated`."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        return share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)


@triton.jit
def gated_pair_kernel(
    gate_ptr,  # [T, I]
    up_ptr,  # [T, I]
    out_ptr,  # [T, I], out
    width,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_column = column < width
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=m_column, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=m_column, other=0.0).to(tl.float32)
    out = activated(gate, ACTIVATION) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=m_column)


@triton.jit
def gate_grad_kernel(
    gate_ptr,  # [T, I]
    up_ptr,  # [T, I]
    grad_ptr,  # [T, I]
    gate_grad_ptr,  # [T, I], out
    up_grad_ptr,  # [T, I], out
    width,
    stride_gate,
    stride_up,
    stride_grad,
    ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_column = column < width
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=m_column, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=m_column, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * stride_grad + column, mask=m_column, other=0.0).to(tl.float32)
    gate_grad = grad * up * slope(gate, ACTIVATION)
    up_grad = grad * activated(gate, ACTIVATION)
    tl.store(gate_grad_ptr + row * width + column, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=m_column)
    tl.store(up_grad_ptr + row * width + column, up_grad.to(up_grad_ptr.dtype.element_ty), mask=m_column)


def norm_grad(x: Tensor, grad: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    """The gradient of x, [T, D] in its dtype, from that of `rms_norm(x, weight)`.

    Args:
        x: [T, D] float16, bfloat16 or float32. grad: [T, D] in the same dtype.
        weight: [D] of any float dtype; the norm scales by ``offset + weight``.

    Raises:
        TypeError, ValueError: a tensor does not fit.
    """
    rows, width = check_first("x", x)
    check("grad", grad, (rows, width), x)
    check("weight", weight, (width,), x, weight.dtype)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        arguments = (x, grad, weight, out, width, x.stride(0), grad.stride(0), eps, offset)
        launching.launch(norm_grad_kernel, (rows,), arguments, row_config(width, False))
    return out


def gated_pair(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, [T, I], contiguous, in the same dtype.

    Args:
        gate, up: [T, I] float16, bfloat16 or float32.
        activation: "silu", "gelu" or "gelu_tanh".

    Raises:
        TypeError, ValueError: a tensor does not fit, or the activation is another one.
    """
    rows, width = _check_pair(gate, up, activation)
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    if out.numel():
        arguments = (gate, up, out, width, gate.stride(0), up.stride(0))
        launching.launch(gated_pair_kernel, _grid(rows, width), arguments, _CONFIG, ACTIVATION=activation)
    return out


def gate_grad(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, [T, I] each, from that of `gated_pair`, which has their shape and dtype.

    Raises:
        TypeError, ValueError: as for `gated_pair`.
    """
    rows, width = _check_pair(gate, up, activation)
    check("grad", grad, (rows, width), gate)
    found = [torch.empty((rows, width), dtype=gate.dtype, device=gate.device) for _ in range(2)]
    if grad.numel():
        arguments = (gate, up, grad, *found, width, gate.stride(0), up.stride(0), grad.stride(0))
        launching.launch(gate_grad_kernel, _grid(rows, width), arguments, _CONFIG, ACTIVATION=activation)
    return found[0], found[1]


_CONFIG = Config({"BLOCK_I": BLOCK_I}, 4, 1)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, cdiv(width, BLOCK_I)


def _check_pair(gate: Tensor, up: Tensor, activation: str) -> tuple[int, int]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    rows, width = check_first("gate", gate)
    check("up", up, (rows, width), gate)
    return rows, width
