"""What a check of results found. A speed is shown whatever it found, and marked where the numbers are not right."""

from __future__ import annotations

from typing import Any

from bench.agreement import OK


def agreed(**found: Any) -> dict[str, Any]:
    """The `agreement` of a record whose results are right; `found` says how near they are."""
    return {"verdict": OK, "why": None, **found}


def not_agreed(verdict: str, why: str) -> dict[str, Any]:
    """The `agreement` of a record whose results are `WRONG`, or could not be compared (`UNCHECKED`)."""
    return {"verdict": verdict, "why": why}


def is_good(record: dict[str, Any]) -> bool:
    """Whether a record's results were found right, or nothing was to be compared."""
    return (record.get("agreement") or {}).get("verdict", OK) == OK
