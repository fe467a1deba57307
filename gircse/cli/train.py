"""`gircse train`: its options are the fields of `TrainConfig`, its recipes files that set them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gircse.cli.common import command
from gircse.cli.plan import add_plan_options, print_plan


def add(commands: Any) -> None:
    from gircse.train.config import TrainConfig

    parser = command(
        commands,
        "train",
        _train,
        "train LoRA adapters with the stepwise contrastive objective",
        'Rows are JSONL: {"prompt": str, "query": str, "pos": [str, ..], "neg": [str, ..]}; all are checked first. '
        "Settings come from the command line, else from the recipe, else they are the defaults below.",
    )
    parser.add_argument("--recipe", help="TOML file with settings, named as the options, with _ for -")
    hints = get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        hint, default = hints[field.name], field.default
        shown = "" if default is None or default in ("", ()) else f" (default: {_written(default)})"
        # without a default of its own an option that is not given leaves no trace, and the recipe's value stands
        options: dict[str, Any] = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
        options["default"] = argparse.SUPPRESS
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "X", "type": get_args(hint)[0]}
        elif set(get_args(hint)) == {int, str}:
            options["type"] = _integer_or_text
        else:
            options["type"] = next((t for t in get_args(hint) if t is not type(None)), hint)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    add_plan_options(parser)


def _written(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(default) if isinstance(default, tuple) else str(default)


def _integer_or_text(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def config_of(arguments: argparse.Namespace) -> Any:
    """The `TrainConfig` of a parsed command line: its options over the recipe's settings over the defaults, or with
    --resume over those of the run that goes on.

    Raises:
        OSError, ValueError: a recipe or a setting that is wrong, or no model or data; each by name.
    """
    from gircse.train.config import TrainConfig
    from gircse.train.recipes import load_recipe

    given = vars(arguments)
    values = load_recipe(arguments.recipe) if arguments.recipe else {}
    if given.get("resume"):
        saved = Path(given.get("output", values.get("output", TrainConfig.output))) / "train_config.json"
        if saved.is_file():
            values = vars(TrainConfig.from_json(saved)) | values
    values |= {field.name: given[field.name] for field in fields(TrainConfig) if field.name in given}
    config = TrainConfig(**values)
    needed = [] if config.adapter and not arguments.plan else ["model"]  # an adapter names its base
    for name in needed if arguments.plan else [*needed, "data"]:
        if not getattr(config, name):
            raise ValueError(f"{name}: got none, expected --{name} or {name!r} in the recipe")
    return config


def _train(arguments: argparse.Namespace) -> None:
    from gircse.lm.environment import first_process
    from gircse.train import train

    config = config_of(arguments)
    if arguments.plan:
        return print_plan(config, arguments)
    result = train(config)
    if first_process():
        print(f"trained {len(result.log)} steps, last loss {result.log[-1]['loss']:.4f}; model in {result.folder}")
