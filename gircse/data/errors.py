"""How bad data are reported: the first problems with their places, and the number of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

MAX_REPORTED = 10


class DataError(ValueError):
    """Data that cannot be used.

    Attributes:
        problems: the first problems, one line each.
        total: how many problems there are.
    """

    def __init__(self, problems: Iterable[str], total: int | None = None) -> None:
        self.problems = tuple(problems)
        self.total = len(self.problems) if total is None else total
        more = self.total - len(self.problems)
        super().__init__("\n".join(self.problems) + (f"\nand {more} more" if more else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # so that the error can be sent from a worker process
        return type(self), (self.problems, self.total)


class Problems:
    """Collects problems: it keeps the first `MAX_REPORTED` and counts the others. Doubts are probable mistakes in data
    that can be used."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.total = 0
        self._doubts: dict[str, tuple[str, int]] = {}  # {what: (its first place, how many places)}

    def add(self, place: str, reason: object) -> None:
        self.total += 1
        if len(self.first) < MAX_REPORTED:
            self.first.append(f"{place}: {reason}")

    def doubt(self, place: str, what: str) -> None:
        """Adds a probable mistake in data that can be used; `check` gives one warning for all its places."""
        first, count = self._doubts.get(what, (place, 0))
        self._doubts[what] = first, count + 1

    def merge(self, error: DataError) -> None:
        self.total += error.total
        self.first = [*self.first, *error.problems][:MAX_REPORTED]

    def check(self, name: str, count: int) -> None:
        """Warns of the doubts.

        Raises:
            DataError: there was a problem, or the data `name` have no row (`count` is 0).
        """
        if not self.total and not count:
            self.add(name, "no rows in it")
        if self.total:
            raise DataError(self.first, self.total)
        for what, (first, count) in self._doubts.items():
            more = f" (and so in {count - 1:,} more rows)" if count > 1 else ""
            warnings.warn(f"{first}: {what}{more}", stacklevel=4)
