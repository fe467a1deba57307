"""What a launcher such as torchrun says in the environment about the processes of a job."""

from __future__ import annotations

import os
from collections.abc import Mapping


def environment_integer(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number in a variable; the default where it is not set, or empty.

    Raises:
        ValueError: it is no number >= 0.
    """
    value = environment.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal():
        raise ValueError(f"{name}: got {value!r}, expected an integer")
    return int(value)


def first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for its job: RANK counts only where WORLD_SIZE says that there are others."""
    return environment_integer("WORLD_SIZE", 1, environment) <= 1 or environment_integer("RANK", 0, environment) == 0
