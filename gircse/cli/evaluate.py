"""`gircse evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gircse.cli.common import add_model_options, command, load_model


def add(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "retrieval quality at many numbers of steps",
        "Searches all positives and negatives of the rows with their queries; one encoding pass serves every K.",
    )
    add_model_options(parser, steps=False)
    parser.add_argument("--data", required=True, help="rows (JSONL as for training, or a saved `datasets` folder)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 5, 7, 10, 15, 20], help="numbers of steps K")
    parser.add_argument("--output", help="write the metrics to this JSON file")


def _evaluate(arguments: argparse.Namespace) -> None:
    from gircse.atomic import new_file
    from gircse.data import load_rows
    from gircse.evaluate import RetrievalTask, evaluate_retrieval
    from gircse.report import metrics_table

    task = RetrievalTask.from_rows(load_rows(arguments.data))
    metrics = evaluate_retrieval(
        load_model(arguments, merge_adapter=True),
        task,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    print(metrics_table(metrics))
    if arguments.output:
        with new_file(Path(arguments.output)) as partial:
            partial.write_text(json.dumps({str(k): v for k, v in metrics.items()}, indent=2) + "\n")
