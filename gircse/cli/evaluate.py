"""`gircse evaluate`: own rows, mteb's tasks, or instruction following, at many numbers of steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gircse.cli.common import add_model_options, command, load_model


def add(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "quality at many numbers of steps: own rows, mteb benchmarks, instruction following",
        "Every text is encoded once, at the largest K, and scored at each. Own rows: their queries search all their "
        "positives and negatives. mteb's tasks need pip install 'gircse[eval]' and their data sets; the benchmark "
        "named offline needs no network.",
    )
    add_model_options(parser, steps=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="rows (JSONL as for training, or a saved `datasets` folder)")
    what.add_argument("--benchmark", help='an mteb benchmark, such as "MTEB(eng, v2)", or offline')
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="mteb tasks by name (those of MTEB(eng, v2): English)")
    what.add_argument(
        "--instruction-following", action="store_true", help="the same texts under different instructions (no network)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 5, 7, 10, 15, 20], help="numbers of steps K")
    parser.add_argument(
        "--output",
        help="--data, --instruction-following: write the metrics to this JSON file. --benchmark, --tasks: folder of "
        "results, table and plot, where finished tasks are kept and not computed again (default: runs/evaluation)",
    )
    parser.add_argument("--instruction", help='--data: stands in for rows without "prompt", "" for none')
    parser.add_argument("--name", help="organisation/name of the model in mteb's results (default: by the checkpoint)")
    parser.add_argument("--overwrite", action="store_true", help="--benchmark, --tasks: compute finished tasks again")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.data:
        _evaluate_rows(arguments)
    elif arguments.instruction_following:
        _evaluate_instruction_following(arguments)
    else:
        _evaluate_tasks(arguments)


def _evaluate_rows(arguments: argparse.Namespace) -> None:
    from gircse.data.retrieval_task import RetrievalTask
    from gircse.data.rows import load_rows
    from gircse.evaluation.retrieval import evaluate_retrieval
    from gircse.show.tables import metrics_table

    task = RetrievalTask.from_rows(load_rows(arguments.data, instruction=arguments.instruction))
    metrics = evaluate_retrieval(
        load_model(arguments, merge_adapter=True),
        task,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    print(metrics_table(metrics))
    _write_json(metrics, arguments.output)


def _evaluate_instruction_following(arguments: argparse.Namespace) -> None:
    from gircse.evaluation.instruction_following import evaluate_instruction_following, instruction_table

    scores = evaluate_instruction_following(
        load_model(arguments, merge_adapter=True),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    print(instruction_table(scores))
    _write_json(scores, arguments.output)


def _evaluate_tasks(arguments: argparse.Namespace) -> None:
    from gircse.evaluation.results import scores_table
    from gircse.evaluation.run import evaluate_tasks, find_tasks

    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    tasks = find_tasks(arguments.benchmark, arguments.tasks or ())
    output = Path(arguments.output or "runs/evaluation")
    evaluation = evaluate_tasks(
        load_model(arguments, merge_adapter=True),
        tasks,
        output,
        steps=arguments.steps,
        benchmark=arguments.benchmark,
        name=arguments.name,
        max_length=512 if arguments.max_length is None else arguments.max_length,  # as benchmarks are compared
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )
    print(scores_table(evaluation))
    print(f"{evaluation.encoded_texts} texts encoded; results, table and plot in {output}", file=sys.stderr)


def _write_json(metrics: Mapping[int, Any], output: str | None) -> None:
    from gircse.files.atomic import new_file

    if output:
        with new_file(Path(output)) as partial:
            partial.write_text(json.dumps({str(k): v for k, v in metrics.items()}, indent=2) + "\n")
