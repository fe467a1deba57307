"""How many candidates of the contrastive loss meet all rows at once. Training plans ask here, too, without Triton."""

from __future__ import annotations


def unit_parts(itemsize: int) -> int:
    """bfloat16 parts of the contrastive loss's unit vectors, by the size of the steps' elements."""
    return 3 if itemsize == 4 else 2


def unit_bytes(width: int, itemsize: int) -> int:
    """Of one unit vector."""
    return 2 * unit_parts(itemsize) * width


def piece_candidates(rows: int, width: int, itemsize: int, budget: int) -> int:
    """Candidates that meet `rows` rows at once. Each has its unit vector, the gradient of that, its similarities and
    their gradient; together they take about as much as four times the rows' vectors, from 2 to 32 times `budget`."""
    each = unit_bytes(width, itemsize) + 4 * width + rows * (4 + 2 * unit_parts(itemsize))
    return max(1, min(max(2 * budget, 4 * rows * unit_bytes(width, itemsize)), 32 * budget) // each)
