"""`gircse encode`: a file of texts, by one process or many."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gircse.cli.common import add_model_options, command, load_model


def add(commands: Any) -> None:
    parser = command(
        commands,
        "encode",
        _encode,
        "embed a file of texts",
        "Reads texts line by line (or JSON Lines) and writes their embeddings, without holding the file in memory. "
        "Into a folder, or under torchrun, it works shard by shard over all ranks and nodes, which share the folder; "
        "started again after it was killed, also with another number of ranks, it goes on with the missing shards.",
    )
    add_model_options(parser, steps=False)
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
    parser.add_argument(
        "--decoding",
        choices=("sequential", "jacobi", "auto"),
        help="soft tokens one after the other, or all together in a few passes (default: as the model's config says)",
    )
    parser.add_argument("--jacobi-tolerance", type=float, help="of jacobi and auto: done when a pass moves less")
    parser.add_argument("--shard-size", type=int, default=4096, help="texts of a shard (folder, or several ranks)")
    parser.add_argument(
        "--shard-timeout", type=float, default=1800, help="seconds to wait for other ranks while none finishes a shard"
    )


def _steps(value: str) -> int | str:
    """An integer, or "auto"."""
    return value if value == "auto" else int(value)


def _encode(arguments: argparse.Namespace) -> None:
    from gircse.encode.files import embedding_writer, read_texts
    from gircse.encode.sharded import Rank, shard_folder

    rank = Rank.of_environment()
    if shard_folder(arguments.output, rank.world_size) is not None:
        _encode_sharded(arguments, rank)
        return
    blocks = read_texts(arguments.input, field=arguments.field)
    first = next(blocks, [])  # a bad file is reported before the model is loaded
    model = load_model(arguments, merge_adapter=True)
    count = 0
    try:
        with embedding_writer(arguments.output) as write:
            block: list[str] | None = first
            while block is not None:
                write(_encode_texts(arguments, model, block))
                count += len(block)
                print(f"\rencoded {count} texts", end="", file=sys.stderr, flush=True)
                block = next(blocks, None)
    except BaseException:
        if count:
            print(file=sys.stderr)  # what went wrong stands on a line of its own
        raise
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
        decoding=arguments.decoding,
        jacobi_tolerance=arguments.jacobi_tolerance,
    )


def _encode_sharded(arguments: argparse.Namespace, rank: Any) -> None:
    from gircse.encode.sharded import encode_sharded

    def load() -> Any:
        arguments.device = _device_of_rank(arguments.device, rank.local_rank)
        return load_model(arguments, merge_adapter=True)

    names = (
        "num_steps",
        "tolerance",
        "max_steps",
        "instruction",
        "max_length",
        "truncate_dim",
        "return_steps",
        "decoding",
        "jacobi_tolerance",
        "dtype",
    )
    settings = {name: getattr(arguments, name) for name in names} | {"normalize": not arguments.no_normalize}
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
