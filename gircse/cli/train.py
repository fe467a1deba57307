"""`gircse train`: its options are the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

from gircse.cli.common import command
from gircse.cli.plan import add_plan_options, print_plan


def add(commands: Any) -> None:
    from gircse.train_config import TrainConfig

    parser = command(
        commands,
        "train",
        _train,
        "train LoRA adapters with the stepwise contrastive objective",
        'Rows are JSONL: {"prompt": str, "query": str, "pos": [str, ..], "neg": [str, ..]}; all are checked first.',
    )
    hints = get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        kind, default = hints[field.name], field.default
        flag = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "default": default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": "X"}
        else:
            options["type"] = next((t for t in get_args(kind) if t is not type(None)), kind)
        assert default is not MISSING
        parser.add_argument(flag, required=field.name in ("model", "data"), **options)
    parser.add_argument("--eval-data", help="rows to evaluate on (retrieval over their positives and negatives)")
    add_plan_options(parser)


def _train(arguments: argparse.Namespace) -> None:
    from gircse.data import load_rows
    from gircse.evaluate import RetrievalTask, evaluate_retrieval
    from gircse.train import train
    from gircse.train_config import TrainConfig

    values: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    config = TrainConfig(**values)
    if arguments.plan:
        return print_plan(config, arguments)
    evaluate = None
    if arguments.eval_data:
        task = RetrievalTask.from_rows(load_rows(arguments.eval_data))
        steps = [config.num_steps] if config.num_steps else [0]

        def evaluate(model: Any) -> dict[str, Any]:
            metrics = evaluate_retrieval(model, task, steps=steps, max_length=config.query_max_length)
            return {str(k): values for k, values in metrics.items()}

    result = train(config, evaluate=evaluate)
    print(f"trained {len(result.log)} steps, last loss {result.log[-1]['loss']:.4f}; model in {result.folder}")
