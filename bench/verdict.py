"""What a check of an op's results found. A speed is shown in any case, and marked where the results are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.agreement import OK, UNCHECKED, WRONG
from bench.agreement import reason as first_line


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
