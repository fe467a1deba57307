"""What a check of results found. A speed is shown whatever it found, and marked where the numbers are not right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.agreement import OK, UNCHECKED, WRONG


class WrongResultError(RuntimeError):
    """Ours is further from float64 than rounding explains: its speed means nothing."""


def verdict_of(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The `agreement` of a record: `OK` with what the check found, `WRONG` where it raised WrongResultError, and
    `UNCHECKED` where it could not be made, for lack of memory for instance."""
    try:
        return {"verdict": OK, "why": None, **check()}
    except WrongResultError as error:
        return {"verdict": WRONG, "why": str(error)}
    except Exception as error:
        return {"verdict": UNCHECKED, "why": first_line(error)}


def is_good(record: dict[str, Any]) -> bool:
    """Whether a record's results were found right, or nothing was to be compared."""
    return (record.get("agreement") or {}).get("verdict", OK) == OK


def first_line(error: BaseException) -> str:
    """Type and first line of the message, for a table's cell."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
