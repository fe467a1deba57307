"""float32 linear layers through oneDNN on x86 CPUs, during this package's own passes of a model.

PyTorch sends a float32 `nn.Linear` to MKL, which leaves AVX-512 unused on AMD processors; oneDNN, which PyTorch ships
as well and uses under `torch.compile`, does not, and is faster from about a hundred rows on. The products are the same
float32 ones in another order.

No layer is changed: inside `onednn_linears` a thread-local `TorchFunctionMode` takes over the calls of `F.linear` that
oneDNN is faster at. Everybody else who calls the model, in another thread or afterwards, finds it as it came.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gircse.ops.tiles_torch import matmul_nt, onednn_linear

# Up to so many rows MKL is as fast or faster, 4 times for one row: oneDNN rearranges the weight in every call.
FEW_ROWS = 64

_HERE = platform.machine() in ("x86_64", "AMD64") and onednn_linear is not None
_here = threading.local()


@contextmanager
def onednn_linears(body: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Inside, linear layers use oneDNN wherever they meet enough rows of float32 on the CPU.

    Elsewhere (other dtypes, other devices, few rows, autocast, functorch's transforms, forward-mode derivatives,
    `torch.compile` and `torch.export`) a linear layer is an ordinary one.

    Args:
        body: the module that is called inside. Its layers that are checkpointed recompute in backward, long after the
            block has ended, what they computed inside it.
        inputs: [B, Q] or [B, Q, D] tokens of the pass.
    """
    rows = inputs.shape[0] * inputs.shape[1]
    if not _HERE or inputs.device.type != "cpu" or rows <= FEW_ROWS or _is_compiled(body):
        yield
        return
    checkpointed = _checkpointed(body) if torch.is_grad_enabled() else []
    for layer in checkpointed:
        layer._gradient_checkpointing_func = _RecomputedAlike(layer._gradient_checkpointing_func)
    try:
        with _mode():
            yield
    finally:
        for layer in checkpointed:
            layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.checkpoint


def _is_compiled(body: nn.Module) -> bool:
    """The compiler chooses products of its own, and would have to look into the mode."""
    return (
        torch.compiler.is_compiling()
        or hasattr(body, "_orig_mod")  # what `torch.compile(body)` gives
        or body._compiled_call_impl is not None
    )


def _checkpointed(body: nn.Module) -> list[Any]:
    """The modules of transformers that go through `torch.utils.checkpoint`; not those that another thread's pass of
    the same model has in hand."""
    return [
        module
        for module in body.modules()
        if module.training
        and getattr(module, "gradient_checkpointing", False)
        and not isinstance(getattr(module, "_gradient_checkpointing_func", None), (_RecomputedAlike, type(None)))
    ]


class _RecomputedAlike:
    """A checkpointing function whose recomputation in backward takes the products of the forward pass.

    Checkpointing that somebody else put around a layer recomputes with PyTorch's own products instead. They keep the
    same tensors for backward, in the same order (see `_linear`), so it works as well, to rounding.
    """

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        def alike(*inputs: Any, **options: Any) -> Any:
            with _mode():
                return function(*inputs, **options)

        return self.checkpoint(alike, *args, **kwargs)


@contextmanager
def _mode() -> Iterator[None]:
    """At most one mode in a thread: each costs a little for every call of PyTorch."""
    if getattr(_here, "active", False):
        yield
        return
    _here.active = True
    try:
        with _OneDNN():
            yield
    finally:
        _here.active = False


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. For backward it keeps what `F.linear` keeps: the rows of the input for a trainable weight, the
    transposed weight for a wanted input gradient, in that order where there is a bias and in the other without."""
    if not _usable(input, weight, bias):
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled():
        out = _WithBias.apply(rows, weight.t(), bias) if bias is not None else _WithoutBias.apply(weight.t(), rows)
    else:
        out = _product(rows, weight, bias)
    return out.reshape(*input.shape[:-1], out.shape[-1])


def _usable(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in (input, weight, input if bias is None else bias))
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.is_contiguous()
        and input.numel() > FEW_ROWS * weight.shape[1]
        and input.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert onednn_linear is not None
    return onednn_linear(rows, weight, bias, "none", [], "")


class _WithBias(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, transposed: Tensor, bias: Tensor) -> Tensor:
        return _product(rows, transposed.t(), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, transposed, _ = inputs
        need_rows, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if need_weight else None, transposed if need_rows else None)

    @staticmethod
    def backward(ctx, grad):
        rows, transposed = ctx.saved_tensors
        return *_gradients(ctx, grad, rows, transposed), grad.sum(0) if ctx.needs_input_grad[2] else None


class _WithoutBias(torch.autograd.Function):
    @staticmethod
    def forward(transposed: Tensor, rows: Tensor) -> Tensor:
        return _product(rows, transposed.t(), None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        transposed, rows = inputs
        need_weight, need_rows = ctx.needs_input_grad
        ctx.save_for_backward(transposed if need_rows else None, rows if need_weight else None)

    @staticmethod
    def backward(ctx, grad):
        transposed, rows = ctx.saved_tensors
        grad_rows, grad_transposed = _gradients(ctx, grad, rows, transposed)
        return grad_transposed, grad_rows


def _gradients(ctx: Any, grad: Tensor, rows: Tensor | None, transposed: Tensor | None) -> tuple:
    """Of the rows and of the transposed weight, whichever are wanted. Where the gradient is itself differentiated, or
    comes for many vectors at once, PyTorch's own products are taken: those it can do that with."""
    plain = torch.is_grad_enabled() or type(grad) is not Tensor or torch._C._functorch.is_batchedtensor(grad)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.t() if plain else matmul_nt(a, b)

    grad_rows = product(grad, transposed) if transposed is not None else None
    grad_transposed = product(grad.t(), rows.t()).t() if rows is not None else None
    return grad_rows, grad_transposed
