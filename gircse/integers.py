"""What counts as an integer where a setting or an argument must be one."""

from __future__ import annotations

import operator
from typing import Any


def as_integer(value: Any) -> int | None:
    """The Python int of whatever Python takes for an index (numpy's integers, a tensor that holds one, ..), but of no
    truth value; None of anything else."""
    if type(value) is int:  # also where torch.compile traces, which follows no more than this
        return value
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool":
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # the latter of tensors without values
        return None


def check_integer(name: str, value: Any, *, least: int, most: int | None = None, expected: str | None = None) -> int:
    """The Python int.

    Raises:
        ValueError: no integer, or one out of range; names the argument, the value and what was expected.
    """
    found = as_integer(value)
    if found is None or found < least:
        raise ValueError(f"{name}: got {value!r}, expected {expected or f'an integer >= {least}'}")
    if most is not None and found > most:
        raise ValueError(f"{name}: got {found}, expected at most {most}")
    return found
