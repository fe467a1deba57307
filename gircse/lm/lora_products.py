"""The products of LoRA layers that read the same input, as one autograd function.

    t = dropout(x) A^T                      [T, R]   A: the A_i of all layers, one below the other
    y_i = x W_i^T + bias_i + t_i B_i^T      [T, E_i] t_i: the columns of t that layer i made; B_i has its scaling in it

W_i and bias_i are frozen. A and B_i are copies in the dtype of the products. The gradients have the dtype of the
weights that were copied, and other devices than the CPU also write each product of a gradient in that dtype; the CPU
has no such product in half precision, and rounds each once. Backward adds every product of x's gradient to the one
before, and writes the gradients of all weights into one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gircse.ops.tiles_torch import matmul_nt

# x, the probability -> x with dropout, and the mask of the elements that stay, bool in its shape.
Drop = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """PyTorch's dropout, a `Drop`."""
    return torch.native_dropout(x, p, True)


def dropout_scale(p: float) -> float:
    """The factor of the elements that stay."""
    return 1 / (1 - p) if p < 1 else 0.0


class Piece(NamedTuple):
    """One adapter of one layer: its place in the stacked matrices.

    Attributes:
        layer: the index of the layer among those that share the input.
        rows: its rows of A, which are its columns of t.
        columns: its columns of the layer's B.
        scaling: the factor in B.
    """

    layer: int
    rows: slice
    columns: slice
    scaling: float


class Products(NamedTuple):
    """What is multiplied with the input.

    Attributes:
        base: the layers without their adapters, `nn.Linear` or transformers' `Conv1D`, frozen.
        a: [R, D].
        b: for each layer [E_i, R_i], with the scaling.
        columns: for each layer its columns of t.
        pieces: of all layers, in the order of their rows of A.
    """

    base: Sequence[Any]
    a: Tensor
    b: Sequence[Tensor]
    columns: Sequence[slice]
    pieces: Sequence[Piece]


class GradientEntry(torch.autograd.Function):
    """The weights A and then B of all pieces -> a vector without values of its own, in their dtype: its gradient is
    theirs, flat and one after the other.

    Every product of a rollout hands one vector to autograd, which adds it to the others in one operator, instead of a
    gradient for each weight.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.shapes = [weight.shape for weight in weights]
        return weights[0].data.as_strided((sum(map(Tensor.numel, weights)),), (0,))  # no memory, and never read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        parts = grad.split([shape.numel() for shape in ctx.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class LoraProducts(torch.autograd.Function):
    """x [.., D], the probability of dropout, a `Drop`, `Products`, a `GradientEntry` -> each y_i [.., E_i].

    Gradients go to x and to the entry, which is None without autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: float, drop: Drop, products: Products, entry: Tensor | None
    ) -> tuple[Tensor, ...]:
        base, a, b, columns, _ = products
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask = drop(rows, dropout) if dropout else (rows, None)
        t = matmul_nt(dropped, a)
        outputs = []
        for layer, b_i, own in zip(base, b, columns, strict=True):
            y = _base_product(rows, layer)
            if b_i.shape[1]:
                y.addmm_(t[:, own], b_i.T)
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.dropout, ctx.products, ctx.dtype = dropout, products, None if entry is None else entry.dtype
        # The copies are saved, so that autograd refuses a backward after they were written with a later step's weights.
        ctx.save_for_backward(dropped, mask, t, a, *b, *map(_weight_by_inputs, base))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, t, a, *matrices = ctx.saved_tensors
        b, base = matrices[: len(grads)], matrices[len(grads) :]
        dy = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        if len(dy) == 1:
            dt = matmul_nt(dy[0], b[0].T)
        else:
            dt = torch.empty_like(t)
            for dy_i, b_i, own in zip(dy, b, ctx.products.columns, strict=True):
                torch.mm(dy_i, b_i, out=dt[:, own])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = matmul_nt(dy[0], base[0])
            for dy_i, weight in zip(dy[1:], base[1:], strict=True):
                _add_product(dx, dy_i, weight)
            if mask is None:
                dx.addmm_(dt, a)
            else:
                dx.addcmul_(matmul_nt(dt, a.T), mask, value=dropout_scale(ctx.dropout))
            dx = dx.view(*grads[0].shape[:-1], -1)
        weights = _weight_gradients(dropped, t, dt, dy, ctx.products, ctx.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, weights


def _weight_gradients(
    dropped: Tensor, t: Tensor, dt: Tensor, dy: Sequence[Tensor], products: Products, dtype: torch.dtype
) -> Tensor:
    """The gradient of a `GradientEntry`."""
    a, b, pieces = products.a, products.b, products.pieces
    shapes = [(b[piece.layer].shape[0], piece.rows.stop - piece.rows.start) for piece in pieces]
    sizes = [a.numel(), *(outputs * rank for outputs, rank in shapes)]
    wide = dtype != dropped.dtype and dropped.device.type != "cpu"
    options: Any = {"out_dtype": dtype} if wide else {}
    flat = dropped.new_empty(sum(sizes), dtype=dtype if wide else None)
    of_a, *of_b = flat.split(sizes)
    torch.mm(dt.T, dropped, out=of_a.view(a.shape), **options)
    for piece, shape, part in zip(pieces, shapes, of_b, strict=True):
        out = part.view(shape)
        # With beta = 0 nothing counts that the buffer held before, not even NaN.
        torch.addmm(out, dy[piece.layer].T, t[:, piece.rows], beta=0, alpha=piece.scaling, out=out, **options)
    return flat.to(dtype)


def _base_product(rows: Tensor, layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(rows, layer.weight, layer.bias)
    return torch.addmm(layer.bias, rows, layer.weight)


def _weight_by_inputs(layer: Any) -> Tensor:
    """[D, E]."""
    return layer.weight.T if isinstance(layer, nn.Linear) else layer.weight


def _add_product(total: Tensor, dy: Tensor, weight: Tensor) -> None:
    """total [T, D] += dy [T, E] @ weight [D, E].T"""
    if total.device.type == "cpu" and total.dtype == torch.float32:
        total += matmul_nt(dy, weight)  # which is faster here by more than the addition costs
    else:
        total.addmm_(dy, weight.T)
