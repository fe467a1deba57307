"""Tiled products in bounded memory: what the torch backends of all ops share.

An op walks a large matrix in chunks of C rows and its own rows in tiles of R; `tiling` chooses both so that everything
temporary fits one fixed workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Upper limit of the temporaries of one chunk and tile (not of the O(T * D) state). The BLAS packs operands in scratch
# of its own, so this is set to half of the 64 MiB that the package promises.
WORKSPACE_BYTES = 32 << 20
# Preferred sizes: a chunk of the matrix fits the last-level cache, a tile of scores the second-level one.
VOCAB_CHUNK = 2048
ROW_TILE = 512


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """``a [M, K] @ b [N, K].T`` in full precision; either may be a transposed view.

    float32 on the CPU goes to oneDNN where PyTorch has it: PyTorch's own ``mm`` is MKL, whose kernels for few rows
    are far from memory speed and which leaves AVX-512 unused on AMD (2.2x slower at 256 rows, 1.4x to 3x at 1 to 16).
    But a part of a wider or transposed matrix has gaps, and for those oneDNN has only its reference kernel, hundreds of
    times slower.
    """
    if (
        onednn_linear is not None
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0]
        and b.shape[0]
        and is_dense(a)
        and is_dense(b)
    ):
        return onednn_linear(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


def is_dense(matrix: Tensor) -> bool:
    """Whether the entries lie side by side in memory, by rows or by columns."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()


def _find_onednn_linear() -> Callable[..., Tensor] | None:
    # The operator behind torch.compile's CPU linear layers: present in every x86 build of PyTorch, not a documented
    # function, hence the fallback.
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


# (input [.., K], weight [N, K], bias [N] or None, "none", [], "") -> input @ weight.T + bias; float32 on x86 CPUs
onednn_linear = _find_onednn_linear()


def tiling(
    num_rows: int, num_vocab: int, *, tiles: int, per_vocab: int, per_row: int, itemsize: int
) -> tuple[int, int]:
    """Row tile R and vocabulary chunk C whose temporaries fit ``WORKSPACE_BYTES``.

    ``tiles`` counts the live [R, C] buffers; ``per_vocab`` and ``per_row`` count elements held per chunk row and tile
    row.
    """
    rows, chunk = max(1, min(ROW_TILE, num_rows)), max(1, min(VOCAB_CHUNK, num_vocab))
    while itemsize * (tiles * rows * chunk + per_vocab * chunk + per_row * rows) > WORKSPACE_BYTES:
        if chunk >= rows and chunk > 16:
            chunk = (chunk + 1) // 2
        elif rows > 1:
            rows = (rows + 1) // 2
        else:
            break
    return rows, chunk


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` (the last may be shorter) that cover ``range(total)``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def is_copied(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether `ChunkReader` copies: to another dtype, and on the CPU also what has gaps between its rows or entries."""
    return matrix.dtype != dtype or (matrix.device.type == "cpu" and not matrix.is_contiguous())


class ChunkReader:
    """Chunks [C, N] of a matrix, dense in the accumulation dtype: views of it, or copies in one re-used buffer.

    A fresh copy for each chunk would cost a page fault for every 4 KiB of it, several times the copy itself. A matrix
    that lies in memory by columns is copied by columns, which is several times faster than transposing it.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype, size: int) -> None:
        self.matrix = matrix
        self.by_columns = matrix.stride(0) < matrix.stride(1)
        self.buffer = matrix.new_empty(size * matrix.shape[1], dtype=dtype) if is_copied(matrix, dtype) else None

    def __call__(self, vocab: slice) -> Tensor:
        """The chunk; valid until the next call."""
        part = self.matrix[vocab]
        if self.buffer is None:
            return part
        if self.by_columns:
            part = part.T
        copied = self.buffer[: part.numel()].view(part.shape).copy_(part)
        return copied.T if self.by_columns else copied
