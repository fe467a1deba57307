"""From records to text: a table is a list of columns and a list of rows, shown on a screen or on a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def value(row: Any, path: str) -> Any:
    """`row["a"]["b"]` for the path "a.b"; None where any of these is missing."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def column(name: str, path: str, pattern: str = "{}", scale: float | None = None) -> Column:
    """A column that shows `value(row, path)`, times `scale`; a dash where there is none."""

    def text(row: Row) -> str:
        number = value(row, path)
        return "-" if number is None else pattern.format(number if scale is None else number * scale)

    return name, text


def filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns in which any row has something to show."""
    return [(name, text) for name, text in columns if any(text(row) != "-" for row in rows)]


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """For a screen: the first column left, the others right, a rule below the header."""
    cells = [[name for name, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        return "  ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True)))

    return "\n".join([line(cells[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, cells[1:])])


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """For a page: cells are not padded, so that one changed number changes one line."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([line([name for name, _ in columns]), rule, *(line([f(row) for _, f in columns]) for row in rows)])
