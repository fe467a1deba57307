"""`gircse distill`: its options are the fields of `DistillConfig`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from gircse.cli.common import command


def add(commands: Any) -> None:
    from gircse.train.distill_config import INITS, DistillConfig

    parser = command(
        commands,
        "distill",
        _distill,
        "train a student without steps towards a GIRCSE teacher",
        "The student is the teacher's base with LoRA of its own; it embeds at the price of one pass, K = 0.",
    )
    hints = get_type_hints(DistillConfig)
    for field in fields(DistillConfig):
        kind, default = hints[field.name], field.default
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "default": default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": "X"}
        else:
            options["type"] = next((t for t in get_args(kind) if t is not type(None)), kind)
        if field.name == "init":
            options["choices"] = INITS
        parser.add_argument("--" + field.name.replace("_", "-"), required=field.name in ("teacher", "data"), **options)
    parser.add_argument("--eval-data", help="rows to evaluate teacher and student on, in one table")


def _distill(arguments: argparse.Namespace) -> None:
    from gircse.data.retrieval_task import RetrievalTask
    from gircse.data.rows import load_rows
    from gircse.train.distill import distill
    from gircse.train.distill_config import DistillConfig

    values: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(DistillConfig)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    config, task = DistillConfig(**values), None
    if arguments.eval_data:
        task = RetrievalTask.from_rows(load_rows(arguments.eval_data, instruction=config.instruction))
    result = distill(config, task=task)
    if task is not None:
        print(result.table())
    before, after = result.agreement["before"], result.agreement["after"]
    print(
        f"distilled {len(result.log)} steps, last loss {result.log[-1]['loss']:.4f}; cosine to the teacher "
        f"{before:.4f} -> {after:.4f}; model in {result.folder}"
    )
