"""What the settings of all runs have in common: a field with its help, and checks that name the field."""

from __future__ import annotations

from dataclasses import field, fields
from numbers import Real
from typing import Any, get_args, get_origin, get_type_hints

from gircse.integers import as_integer, check_integer


def setting(default: Any, help: str) -> Any:
    """A field of a dataclass of settings. The command line makes an option of its name, type and help."""
    return field(default=default, metadata={"help": help})


class Settings:
    """Base of the frozen dataclasses of settings.

    Each check raises ValueError with the name of the field, the value that it got and the value that it expected.
    """

    def check_types(self) -> None:
        """Converts each field to its declared type (`typed`), or raises."""
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            object.__setattr__(self, item.name, typed(item.name, getattr(self, item.name), hints[item.name]))

    def expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def expect_integers(self, *names: str, least: int = 1) -> None:
        """None is allowed: `check_types` has refused it for fields that must have a value."""
        for name in names:
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=least)

    def expect_positive(self, *names: str) -> None:
        for name in names:
            self.expect(name, 0 < getattr(self, name) < float("inf"), "a number > 0")

    def expect_not_negative(self, *names: str) -> None:
        for name in names:
            self.expect(name, 0 <= getattr(self, name) < float("inf"), "a number >= 0")

    def expect_fractions(self, *names: str) -> None:
        for name in names:
            self.expect(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")


_TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` in the declared type of a field: lists become tuples, and numpy's numbers become Python's.

    Raises:
        ValueError: the value has another type.
    """
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: got {value!r}, expected a list, each {_TYPE_NAMES[item]}")
        return tuple(typed(f"{name}[{i}]", part, item) for i, part in enumerate(value))
    types = get_args(hint) or (hint,)
    if isinstance(value, types) and (bool in types or not isinstance(value, bool)):
        return value
    if int in types and (integer := as_integer(value)) is not None:
        return integer
    if float in types and isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: got an integer past every float, expected {_TYPE_NAMES[float]}") from None
    expected = " or ".join(_TYPE_NAMES[kind] for kind in types if kind in _TYPE_NAMES)
    raise ValueError(f"{name}: got {value!r}, expected {expected}")
