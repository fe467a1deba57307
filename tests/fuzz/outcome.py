"""A call as what came of it: a result, or one of the errors that are allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def outcome(call: Callable[[], Any], *allowed: type[BaseException]) -> tuple[Any, BaseException | None]:
    """(result, None) or (None, error); any error but an allowed one is raised."""
    try:
        return call(), None
    except allowed as error:
        return None, error
