"""Launchers of the contrastive kernels: pooled unit vectors, softmax sums over candidates, gradients. No autograd.

Vectors are float32, step first: rows [K, B, D], candidates [K, M, D]. What one call of `sums` returns can be merged
with that of other candidates, which is how queries as negatives and other ranks' candidates come in. Nothing waits for
the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import launching
from ..contract import Pooled, Sums
from ..launching import device_of
from ..plan import ROW_BLOCK, Config, Device, cdiv, chunk_size, even_blocks, lookup
from .pooling import pool_grad_kernel, pool_kernel
from .similarity import similarity_kernel

PRECISION = "tf32x3"
SMALLEST = 1e-37  # of a norm: a shorter vector has no direction
CHUNK_BYTES = 32 << 20  # of a chunk's similarities, or of what is left of them


def pool(steps: Tensor, pooling: str, first: int = 0, last: int | None = None) -> Pooled:
    """Unit vectors after steps `first` + 1 to `last` (None: all) of `steps` [B, K, D], any float dtype and strides."""
    rows, num_steps, width = steps.shape
    last = num_steps if last is None else last
    out = torch.empty((last - first, rows, width), dtype=torch.float32, device=steps.device)
    norms = torch.empty((last - first, rows), dtype=torch.float32, device=steps.device)
    if rows:
        launching.launch(
            pool_kernel,
            (rows,),
            (steps, out, norms, rows, first, last, width, *steps.stride(), SMALLEST),
            _row_config(width),
            LAST=pooling == "last",
            WEIGHTED=pooling == "weighted",
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
    device: Device | None = None,
) -> Sums:
    """Softmax sums of rows [K, B, D] over candidates [K, M, D].

    `target` [B] int64 (negative: elsewhere), `mask` [B, M] bool (True: does not count), `exclude` [B] int64 (a
    candidate that does not count; negative: none).
    """
    num_steps, num_rows, _ = rows.shape
    num_columns = candidates.shape[1]
    mask = _rowwise(mask)
    config = lookup("score", (device or device_of(rows.device)).arch, 4, min(num_rows, ROW_BLOCK))
    tile = config.blocks["BLOCK_V"]
    # what a chunk leaves: four numbers for each row and tile
    chunk = chunk_size(num_columns, max(1, CHUNK_BYTES // (16 * num_steps * num_rows)) * tile, tile)
    found: Sums | None = None
    for start in range(0, num_columns, chunk):
        size = min(chunk, num_columns - start)
        parts = torch.empty((4, num_steps, cdiv(size, tile), num_rows), dtype=torch.float32, device=rows.device)
        _similarity(rows, candidates, target, temperature, mask, exclude, start, size, config, parts=parts)
        peak = parts[0].amax(1)
        total = (parts[1] * (parts[0] - peak[:, None]).exp()).sum(1)
        part = Sums(peak, total, parts[2].amax(1), parts[3].amax(1))
        found = part if found is None else found.merge(part)
    assert found is not None
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
    device: Device | None = None,
) -> Tensor | None:
    """Gradients of `sum_k weight_k sum_i (log total - (positive - peak))`: that of the rows is added to `grad_rows`
    [K, B, D], contiguous (None: nobody wants it), that of the candidates [K, M, D] returned.

    `peak` and `total` [K, B] are those over all candidates, of which these may be a part; `weight` [K] float32.
    """
    num_steps, num_rows = rows.shape[:2]
    num_columns = candidates.shape[1]
    arch = (device or device_of(rows.device)).arch
    config = lookup("score", arch, 4, min(num_rows, ROW_BLOCK))
    block = even_blocks(num_rows, ROW_BLOCK)
    chunk = chunk_size(num_columns, CHUNK_BYTES // (4 * num_steps * block), config.blocks["BLOCK_V"])
    mask, weight = _rowwise(mask), weight / temperature
    grad_candidates = torch.empty_like(candidates) if need_candidates else None
    several = block < num_rows
    for start in range(0, num_columns, chunk):
        size = min(chunk, num_columns - start)
        for first in range(0, num_rows, block):
            part = slice(first, min(first + block, num_rows))
            grad = torch.empty((num_steps, part.stop - first, size), dtype=torch.float32, device=rows.device)
            picked = [t[:, part].contiguous() if several else t for t in (rows, peak, total)]
            _similarity(
                picked[0], candidates, target[part], temperature, None if mask is None else mask[part],
                None if exclude is None else exclude[part], start, size, config,
                peak=picked[1], total=picked[2], weight=weight, grad=grad,
            )  # fmt: skip
            for k in range(num_steps):
                columns = slice(start, start + size)
                if grad_rows is not None:
                    launching.tf32x3_product(grad[k], candidates[k, columns], grad_rows[k, part], add=True)
                if grad_candidates is not None:
                    launching.tf32x3_product(grad[k].T, picked[0][k], grad_candidates[k, columns], add=first > 0)
    return grad_candidates


def _rowwise(mask: Tensor | None) -> Tensor | None:
    """The kernel walks along a row of the mask in steps of one."""
    return mask if mask is None or mask.stride(1) == 1 else mask.contiguous()


def _similarity(
    rows: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    mask: Tensor | None,
    exclude: Tensor | None,
    start: int,
    size: int,
    config: Config,
    *,
    peak: Tensor | None = None,
    total: Tensor | None = None,
    weight: Tensor | None = None,
    grad: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    num_steps, num_rows, width = rows.shape
    launching.launch(
        similarity_kernel,
        (cdiv(num_rows, config.blocks["BLOCK_T"]) * cdiv(size, config.blocks["BLOCK_V"]), num_steps),
        (
            rows, candidates, target, exclude, None if mask is None else mask.view(torch.int8),
            peak, total, weight, grad, parts,
            num_rows, candidates.shape[1], width, num_steps, start, size,
            0 if mask is None else mask.stride(0), 1.0 / temperature,
        ),
        config,
        HAS_EXCLUDE=exclude is not None,
        HAS_MASK=mask is not None,
        GRADIENT=grad is not None,
        PRECISION=PRECISION,
    )  # fmt: skip
