"""float32 linear layers through oneDNN on x86 CPUs, during this package's own passes of a model.

PyTorch sends a float32 `nn.Linear` to MKL, which does not use AVX-512 on AMD processors. oneDNN, which PyTorch ships
too and uses under `torch.compile`, does use it and is faster from about a hundred rows on. It computes the same float32
products in another order.

No layer is changed: inside `onednn_linears` a thread-local `TorchFunctionMode` replaces the calls of `F.linear` that
are faster with oneDNN. Calls of the model from other threads or outside the block are ordinary ones.
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

# Up to this many rows MKL is as fast or faster (4 times for one row): oneDNN rearranges the weight in every call.
FEW_ROWS = 64

_HERE = platform.machine() in ("x86_64", "AMD64") and onednn_linear is not None
_here = threading.local()


@contextmanager
def onednn_linears(body: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Inside, linear layers use oneDNN for enough rows of float32 on the CPU.

    In all other cases (other dtypes and devices, few rows, autocast, functorch's transforms, forward-mode derivatives,
    `torch.compile` and `torch.export`) a linear layer computes as usual.

    Args:
        body: the module that is called inside. Its checkpointed layers recompute in backward, after the block has
            ended, with the same products.
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
    """A compiled body is left alone: the compiler chooses its own products and would have to trace the mode."""
    return (
        torch.compiler.is_compiling()
        or hasattr(body, "_orig_mod")  # `torch.compile(body)` wraps the body
        or body._compiled_call_impl is not None
    )


def _checkpointed(body: nn.Module) -> list[Any]:
    """The modules of transformers that call `torch.utils.checkpoint`, without those that another thread's pass of the
    same model has replaced at the moment."""
    return [
        module
        for module in body.modules()
        if module.training
        and getattr(module, "gradient_checkpointing", False)
        and not isinstance(getattr(module, "_gradient_checkpointing_func", None), (_RecomputedAlike, type(None)))
    ]


class _RecomputedAlike:
    """A checkpointing function whose recomputation in backward uses the products of the forward pass.

    Checkpointing from elsewhere recomputes with PyTorch's own products instead. They save the same tensors for backward
    in the same order (see `_linear`), so it works too, to rounding.
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
    """Enters at most one mode in a thread, because each makes every call of PyTorch a little slower."""
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
    """`F.linear`. For backward it saves what `F.linear` saves: the rows of the input for a trainable weight and the
    transposed weight for an input gradient, in that order with a bias and in the other order without."""
    if not _usable(input, weight, bias):
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled():
        out = _Linear.apply(rows, weight.t(), bias)
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        return _product(rows, transposed.t(), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, transposed, bias = inputs
        need_rows, need_weight, _ = ctx.needs_input_grad
        saved = (rows if need_weight else None, transposed if need_rows else None)
        ctx.order = 1 if bias is not None else -1
        ctx.save_for_backward(*(saved if bias is not None else saved[::-1]))

    @staticmethod
    def backward(ctx, grad):
        rows, transposed = ctx.saved_tensors[:: ctx.order]
        return *_gradients(grad, rows, transposed), grad.sum(0) if ctx.needs_input_grad[2] else None


def _gradients(grad: Tensor, rows: Tensor | None, transposed: Tensor | None) -> tuple:
    """The gradients of the rows and of the transposed weight, where they are needed. A gradient that is differentiated
    again or batched by functorch takes PyTorch's own products, which support that."""
    plain = torch.is_grad_enabled() or type(grad) is not Tensor or torch._C._functorch.is_batchedtensor(grad)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.t() if plain else matmul_nt(a, b)

    grad_rows = product(grad, transposed) if transposed is not None else None
    grad_transposed = product(grad.t(), rows.t()).t() if rows is not None else None
    return grad_rows, grad_transposed
