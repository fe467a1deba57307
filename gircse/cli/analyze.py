"""`gircse analyze`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gircse.cli.common import add_model_options, command, load_model


def add(commands: Any) -> None:
    parser = command(
        commands,
        "analyze",
        _analyze,
        "where refinement stops, clustering per step, against an encoder-only baseline",
        "The paper's open checks on your data: quality and movement for K up to 100, clustering quality of each K, the "
        "difference to an encoder-only baseline, the anatomy of soft tokens. Every text is encoded once.",
    )
    add_model_options(parser, steps=False)
    parser.add_argument("--data", required=True, help="rows (JSONL as for training, or a saved `datasets` folder)")
    parser.add_argument("--baseline", help="encoder-only model, run with K = 0 (default: K = 0 of the model itself)")
    parser.add_argument("--labels", help='texts to cluster: JSONL of {"text": str, "label": str or int}')
    parser.add_argument("--labels-instruction", help="instruction for the texts to cluster")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100], help="numbers of steps K"
    )
    parser.add_argument("--sample", type=int, default=64, help="texts whose soft tokens are taken apart")
    parser.add_argument("--instruction", help='stands in for rows without "prompt", "" for none')
    parser.add_argument("--max-rows", type=int, help="only the first rows of the data")
    parser.add_argument("--output", default="runs/analysis", help="folder of analysis.json and the plots")


def _analyze(arguments: argparse.Namespace) -> None:
    from gircse.analysis.analyze import analyze
    from gircse.analysis.plots import plot_analysis
    from gircse.analysis.table import analysis_table
    from gircse.data.labelled_texts import LabelledTexts
    from gircse.data.retrieval_task import RetrievalTask
    from gircse.data.rows import load_rows
    from gircse.files.atomic import new_file
    from gircse.files.lock import folder_lock

    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise ValueError(f"max_rows: got {arguments.max_rows}, expected an integer >= 1")
    # bad files are reported before a model is loaded
    task = RetrievalTask.from_rows(load_rows(arguments.data, instruction=arguments.instruction)[: arguments.max_rows])
    clusters = (
        LabelledTexts.read(arguments.labels, instruction=arguments.labels_instruction) if arguments.labels else None
    )
    output = Path(arguments.output)
    with folder_lock(output):
        model = load_model(arguments, merge_adapter=True)
        baseline = load_model(_of_baseline(arguments), merge_adapter=True) if arguments.baseline else None
        result = analyze(
            model,
            task,
            baseline=baseline,
            clusters=clusters,
            steps=arguments.steps,
            sample=arguments.sample,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            scratch=output,
        )
        result["models"] = {name: getattr(arguments, name) for name in ("model", "adapter", "baseline")}
        with new_file(output / "analysis.json") as partial:
            partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(analysis_table(result))
        files = plot_analysis(result, output)
        print(f"wrote {', '.join(map(str, [output / 'analysis.json', *files]))}", file=sys.stderr)


def _of_baseline(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "model": arguments.baseline, "adapter": None, "num_steps": 0})
