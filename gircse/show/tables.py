"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: the first to the left, the others to the right. Floats have four digits."""
    cells = [list(header), *([f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def metrics_table(metrics: Mapping[Any, Mapping[str, float]], *, title: str = "K") -> str:
    """One line for each key, whose column has the title, and one column for each metric."""
    names = list(next(iter(metrics.values())))
    return text_table([title, *names], [[key, *(values[name] for name in names)] for key, values in metrics.items()])
