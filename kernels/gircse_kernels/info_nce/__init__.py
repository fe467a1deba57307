"""Launchers of the contrastive loss: pooled unit vectors, softmax sums over candidates, gradients. No autograd.

cuBLAS multiplies, on the tensor cores: a float32 vector is a sum of bfloat16 parts, step first, rows [K, B, P, D] and
candidates [K, C, P, D], and a product of two such vectors is the sum over the parts' products that count. Two parts,
for vectors of half precision, leave an error of about 2^-18; three, for float32, have its accuracy. The candidates of
one call are a piece that meets all rows at once, so its similarities [K, B, C] exist; `piece_candidates` says how many
a piece may have, and one call after the other sees the next piece. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import launching
from ..contract import Pooled, Sums
from ..pieces import piece_candidates, unit_bytes, unit_parts
from ..plan import Config
from .pooling import pool_grad_kernel, pool_kernel
from .softmax import softmax_grad_kernel, softmax_sums_kernel

__all__ = ["gradients", "piece_candidates", "pool", "pool_gradient", "sums", "unit_bytes"]

SMALLEST = 1e-37  # of a norm: a shorter vector has no direction
_ROW = Config({"BLOCK": 1024}, 4, 1)


def pool(steps: Tensor, pooling: str, first: int = 0, last: int | None = None) -> Pooled:
    """Unit vectors after steps `first` + 1 to `last` (None: all) of `steps` [B, K, D], any float dtype and strides."""
    rows, num_steps, width = steps.shape
    last = num_steps if last is None else last
    parts = unit_parts(steps.dtype.itemsize)
    out = torch.empty((last - first, rows, parts, width), dtype=torch.bfloat16, device=steps.device)
    norms = torch.empty((last - first, rows), dtype=torch.float32, device=steps.device)
    if rows:
        launching.launch(
            pool_kernel,
            (rows,),
            (steps, out, norms, rows, first, last, width, *steps.stride(), SMALLEST),
            _row_config(width),
            LAST=pooling == "last",
            WEIGHTED=pooling == "weighted",
            PARTS=parts,
        )
    return Pooled(out, norms)


def pool_gradient(
    grad: Tensor, pooled: Pooled, pooling: str, out: Tensor, first: int = 0, carry: Tensor | None = None
) -> None:
    """Writes the gradient of steps `first` + 1 and on into `out` [B, K, D], contiguous, from that of the unit vectors.

    Call for the last steps first: what they leave for the earlier ones is read from `out`, or, where its dtype would
    round it, kept in `carry` [B, D] float32.
    """
    count, rows, width = grad.shape
    if not rows:
        return
    launching.launch(
        pool_grad_kernel,
        (rows,),
        (
            grad.contiguous(), pooled.vectors, pooled.norms, carry, out,
            rows, out.shape[1], first, first + count, width, SMALLEST,
        ),
        _row_config(width),
        CARRIED=pooling != "last" and first + count < out.shape[1],
        BUFFERED=carry is not None,
        LAST=pooling == "last",
        WEIGHTED=pooling == "weighted",
        PARTS=pooled.vectors.shape[2],
    )  # fmt: skip


def _row_config(width: int) -> Config:
    block = 1 << (width - 1).bit_length()
    return Config({"BLOCK_D": block}, 4 if block <= 2048 else 8, 1)


def sums(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    *,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    into: Sums | None = None,
) -> Sums:
    """Softmax sums of rows [K, B, P, D] over candidates [K, C, P, D], and over those that `into` has seen, which is
    used up.

    `target` [B] int64 (negative: elsewhere), `mask` [B, C] bool (True: does not count), `exclude` [B] int64 (a
    candidate that does not count; negative: none).
    """
    num_steps, num_rows = rows.shape[:2]
    scores = _scores(rows, candidates)
    found = Sums(*scores.new_empty((4, num_steps, num_rows)).unbind()) if into is None else into
    mask = _rowwise(mask)
    launching.launch(
        softmax_sums_kernel,
        (num_rows, num_steps),
        (
            scores, target, exclude, mask, *found,
            num_rows, scores.shape[2], 0 if mask is None else mask.stride(0), 1.0 / temperature,
        ),
        _ROW,
        FIRST=into is None,
        HAS_EXCLUDE=exclude is not None,
        HAS_MASK=mask is not None,
    )  # fmt: skip
    return found


def gradients(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    peak: Tensor,
    total: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    grad_rows: Tensor | None = None,
    need_candidates: bool = True,
) -> Tensor | None:
    """Gradients of `sum_k weight_k sum_i (log total - (positive - peak))`: that of the rows is added to `grad_rows`
    [K, B, D] float32 (None: nobody wants it), that of the candidates [K, C, D] float32 returned.

    `peak` and `total` [K, B] are those over all candidates, of which these are a piece; `weight` [K] float32.
    """
    num_steps, num_rows, parts, width = rows.shape
    scores = _scores(rows, candidates)
    mask = _rowwise(mask)
    grad = rows.new_empty((num_steps, num_rows, parts, scores.shape[2]))
    launching.launch(
        softmax_grad_kernel,
        (num_rows, num_steps),
        (
            scores, target, exclude, mask, peak.contiguous(), total.contiguous(), weight.contiguous(), grad,
            num_rows, scores.shape[2], 0 if mask is None else mask.stride(0), 1.0 / temperature,
        ),
        _ROW,
        HAS_EXCLUDE=exclude is not None,
        HAS_MASK=mask is not None,
        PARTS=parts,
    )  # fmt: skip
    del scores
    if grad_rows is not None:
        _add_product(grad.unbind(2), candidates.unbind(2), grad_rows)
    if not need_candidates:
        return None
    grad_candidates = weight.new_empty((num_steps, candidates.shape[1], width))
    _add_product([part.mT for part in grad.unbind(2)], rows.unbind(2), grad_candidates, first=True)
    return grad_candidates


def _scores(rows: Tensor, candidates: Tensor) -> Tensor:
    """x . y [K, B, C] float32."""
    shape = rows.shape[0], rows.shape[1], candidates.shape[1]
    scores = torch.empty(shape, dtype=torch.float32, device=rows.device)
    _add_product(rows.unbind(2), [part.mT for part in candidates.unbind(2)], scores, first=True)
    return scores


def _add_product(a: Sequence[Tensor], b: Sequence[Tensor], out: Tensor, *, first: bool = False) -> None:
    """out [K, M, N] += (sum of a's parts [K, M, L]) @ (sum of b's parts [K, L, N]); = with `first`.

    Products of parts beyond the last one's size are left out; the smallest come first.
    """
    for order in reversed(range(len(a))):
        for i in range(order + 1):
            launching.batched_product(a[i], b[order - i], out, add=not first)
            first = False


def _rowwise(mask: Tensor | None) -> Tensor | None:
    """The mask as bytes; the kernels walk along its rows in steps of one."""
    if mask is None:
        return None
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.int8)
