"""What the settings of all jobs have in common: a field with its help, types that are checked, bounds by name."""

from __future__ import annotations

from dataclasses import field
from numbers import Real
from typing import Any, get_args, get_origin, get_type_hints

from gircse.integers import as_integer


def knob(default: Any, help: str) -> Any:
    """A dataclass field; the command line is made from its name, type and help."""
    return field(default=default, metadata={"help": help})


class Knobs:
    """Base of a frozen dataclass of settings. A check raises ValueError: the field, what came, what was expected."""

    def check_types(self) -> None:
        """Each field in the type that it is declared with: see `typed`."""
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), hint))

    def expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def expect_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self.expect(name, value is None or value >= 1, "an integer >= 1")

    def expect_positive(self, *names: str) -> None:
        for name in names:
            self.expect(name, 0 < getattr(self, name) < float("inf"), "a number > 0")

    def expect_not_negative(self, *names: str) -> None:
        for name in names:
            self.expect(name, 0 <= getattr(self, name) < float("inf"), "a number >= 0")

    def expect_shares(self, *names: str) -> None:
        for name in names:
            self.expect(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` in the type of a field: lists become tuples, and numbers (numpy's too) Python's own.

    Raises:
        ValueError: another type; names the field, the value and what was expected.
    """
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: got {value!r}, expected a list, each {_KINDS[item]}")
        return tuple(typed(f"{name}[{i}]", part, item) for i, part in enumerate(value))
    kinds = get_args(hint) or (hint,)
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    if int in kinds and (integer := as_integer(value)) is not None:
        return integer
    if float in kinds and isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: got an integer past every float, expected {_KINDS[float]}") from None
    expected = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
    raise ValueError(f"{name}: got {value!r}, expected {expected}")
