"""Records to text: one table per mode, columns aligned, a dash where there is nothing to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Column = tuple[str, Callable[[dict[str, Any]], str]]


def _number(key: str, pattern: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row[key] is None else pattern.format(row[key] * scale)


_COMMON: list[Column] = [
    ("engine", lambda row: row["engine"]),
    ("K", lambda row: str(row["num_steps"])),
    ("seconds", _number("seconds", "{:.4g}")),
    ("spread", _number("spread", "{:.0%}")),
    ("texts/s", _number("texts_per_second", "{:,.4g}")),
    ("tokens/s", _number("tokens_per_second", "{:,.0f}")),
    ("x recompute", _number("speedup_over_recompute", "{:.2f}x")),
]
_FLOOR: list[Column] = [
    ("floor s", _number("floor_seconds", "{:.4g}")),
    ("time/floor", _number("time_over_floor", "{:.2f}")),
]
THROUGHPUT = [*_COMMON, ("of single-pass", _number("texts_ratio_to_single_pass", "{:.0%}")), *_FLOOR]
TRAINING = [
    *_COMMON,
    ("peak GiB", _number("peak_bytes", "{:.2f}", 1 / 2**30)),
    ("over model GiB", _number("peak_extra_bytes", "{:.2f}", 1 / 2**30)),
    ("peak/recompute", _number("peak_ratio_to_recompute", "{:.2f}")),
    *_FLOOR,
]


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """First column left, the others right; a rule below the header."""
    cells = [[name for name, _ in columns], *([value(row) for _, value in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        return "  ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True)))

    return "\n".join([line(cells[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, cells[1:])])
