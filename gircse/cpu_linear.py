"""float32 linear layers through oneDNN on x86 CPUs.

PyTorch sends a float32 `nn.Linear` to MKL, which leaves AVX-512 unused on AMD processors; oneDNN, which PyTorch ships
as well and uses under `torch.compile`, does not, and is faster from about a hundred rows on. The products are the same
float32 ones in another order.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gircse.ops.tiles_torch import matmul_nt, onednn_linear

# Up to so many rows MKL is as fast or faster, 4 times for one row: oneDNN rearranges the weight in every call.
FEW_ROWS = 64

_HERE = platform.machine() in ("x86_64", "AMD64") and onednn_linear is not None


def use_onednn(model: nn.Module) -> None:
    """Makes the plain `nn.Linear` layers of `model` use oneDNN wherever they meet float32 on the CPU.

    Only the layers' class changes: parameters, names, state dict and `isinstance(_, nn.Linear)` stay. Elsewhere (other
    dtypes, other devices, few rows, autocast, `torch.compile`) such a layer is an ordinary one.
    """
    if _HERE:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """`nn.Linear` whose float32 CPU products are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        usable = (
            input.dtype == self.weight.dtype == torch.float32
            and input.device.type == self.weight.device.type == "cpu"
            and input.numel() > FEW_ROWS * self.in_features
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )
        if not usable:
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """Keeps what `nn.Linear` keeps: the input for a trainable weight, the weight for a wanted input gradient."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert onednn_linear is not None
        return onednn_linear(input, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _ = inputs
        need_input, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_input = matmul_nt(rows, weight.T).reshape(*grad.shape[:-1], weight.shape[1]) if need_input else None
        grad_weight = matmul_nt(rows.T, input.reshape(-1, input.shape[-1]).T) if need_weight else None
        return grad_input, grad_weight, rows.sum(0) if need_bias else None
