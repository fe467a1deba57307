"""The options of `gircse train` and `gircse distill`: one for each field of their dataclass of settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from gircse.train.run_config import RunConfig

_Config = TypeVar("_Config", bound="RunConfig")


def add_settings(parser: argparse.ArgumentParser, config: type[RunConfig]) -> None:
    """Adds the options: those of this kind of run first, then those that both kinds have.

    An option that is not given leaves no attribute, so that `config_of` can tell it from one that is.
    """
    from gircse.train.run_config import RunConfig

    hints, shared = get_type_hints(config), {field.name for field in fields(RunConfig)}
    for field in sorted(fields(config), key=lambda field: field.name in shared):
        hint, default = hints[field.name], field.default
        shown = "" if default is None or default in ("", ()) else f" (default: {_written(default)})"
        options: dict[str, Any] = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "X", "type": get_args(hint)[0]}
        elif set(get_args(hint)) in ({int, str}, {float, str}):
            options["type"] = partial(_number_or_text, get_args(hint)[0])
        else:
            options["type"] = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def config_of(arguments: argparse.Namespace, config: type[_Config], recipe: Mapping[str, Any]) -> _Config:
    """The settings of a parsed command line.

    The options stand over the recipe, and the recipe over the defaults or, with --resume, over the settings of the run
    that goes on.

    Raises:
        ValueError: a setting is wrong.
    """
    values = {**recipe, **{item.name: vars(arguments)[item.name] for item in fields(config) if item.name in arguments}}
    if values.get("resume"):
        saved = config(**{name: value for name, value in values.items() if name == "output"}).path("config.json")
        if saved.is_file():
            values = vars(config.from_json(saved)) | values
    return config(**values)


def require(config: RunConfig, *names: str) -> None:
    """Raises ValueError for a setting that a run needs and that has no value."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name}: got none, expected --{name}")


def _written(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(default) if isinstance(default, tuple) else str(default)


def _number_or_text(kind: type[int] | type[float], text: str) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        return text
