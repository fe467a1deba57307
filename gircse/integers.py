"""Which values count as an integer, where a setting or an argument must be one."""

from __future__ import annotations

import operator
from typing import Any


def as_integer(value: Any) -> int | None:
    """The Python int of any value that Python accepts as an index (numpy's integers, a tensor that holds one, ..).
    None for truth values and for everything else."""
    if type(value) is int:  # torch.compile traces this line, and could not trace the others
        return value
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool":
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # a RuntimeError comes from tensors without values
        return None


def check_integer(name: str, value: Any, *, least: int, most: int | None = None, expected: str | None = None) -> int:
    """`value` as a Python int.

    Raises:
        ValueError: `value` is no integer, or out of range; the message has the name, the value and what was expected.
    """
    integer = as_integer(value)
    if integer is None or integer < least:
        raise ValueError(f"{name}: got {value!r}, expected {expected or f'an integer >= {least}'}")
    if most is not None and integer > most:
        raise ValueError(f"{name}: got {integer}, expected at most {most}")
    return integer
