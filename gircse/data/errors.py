"""How bad data are reported: the first problems by place, the rest counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

MAX_REPORTED = 10


class DataError(ValueError):
    """Data that cannot be used. `problems` are the first ones, one line each; `total` counts all of them."""

    def __init__(self, problems: Iterable[str], total: int | None = None) -> None:
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        more = self.total - len(self.problems)
        super().__init__("\n".join(self.problems) + (f"\nand {more} more" if more else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # survives the way back from a worker process
        return type(self), (self.problems, self.total)


class Problems:
    """Keeps the first `MAX_REPORTED` problems and counts the rest; beside them what may be meant otherwise."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.total = 0
        self._doubts: dict[str, tuple[str, int]] = {}  # what: its first place, and how many there are

    def add(self, place: str, reason: object) -> None:
        self.total += 1
        if len(self.first) < MAX_REPORTED:
            self.first.append(f"{place}: {reason}")

    def doubt(self, place: str, what: str) -> None:
        """Something that can be used, and is probably a mistake: one warning for all places."""
        first, count = self._doubts.get(what, (place, 0))
        self._doubts[what] = first, count + 1

    def merge(self, error: DataError) -> None:
        self.total += error.total
        self.first = [*self.first, *error.problems][:MAX_REPORTED]

    def check(self) -> None:
        """Raises DataError if there was any; otherwise warns of the doubts."""
        if self.total:
            raise DataError(self.first, self.total)
        for what, (first, count) in self._doubts.items():
            more = f" (and so in {count - 1:,} more rows)" if count > 1 else ""
            warnings.warn(f"{first}: {what}{more}", stacklevel=4)
