"""`gircse encode`: files of texts, on one machine, as a share of a Slurm array, or on a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gircse.cli.common import add_model_options, command, load_model

# The options that are arguments of `GIRCSE.encode` of the same name.
_ENCODE = ("tolerance", "max_steps", "batch_size", "max_length", "truncate_dim", "decoding", "jacobi_tolerance")


def add(commands: Any) -> None:
    parser = command(
        commands,
        "encode",
        _encode,
        "embed files of texts",
        "Reads Parquet, JSON Lines or lines of text, from a disk or by URL, and writes embeddings, without holding the "
        "files in memory. Parquet keeps all other columns, and started again after it was killed, the command goes on.",
    )
    add_model_options(parser, steps=False)
    parser.add_argument(
        "--num-steps", type=_steps, help="K, soft tokens per text (default: the model's own), or auto: texts stop early"
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of auto: stop when the embedding moves less")
    parser.add_argument("--max-steps", type=int, default=20, help="of auto: the most steps of a text")
    parser.add_argument(
        "input",
        nargs="+",
        help=".parquet, .jsonl or files with one text a line; folders, patterns with *, URLs; or - for standard input",
    )
    parser.add_argument(
        "--output",
        required=True,
        help=".parquet or a folder of it, also by URL; .npy (float32 [n, D]) or .jsonl ({'embedding': [..]} a line)",
    )
    parser.add_argument("--column", "--field", default="text", help="column or field that holds the texts")
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
    parser.add_argument("--part", default="1/1", help="encode only this share of the rows, such as 2/8")
    tables = parser.add_argument_group("Parquet output")
    tables.add_argument("--output-column", default="embedding", help="column of the embeddings")
    tables.add_argument("--output-dtype", default="float32", help="float32, float16, or int8 with a column of scales")
    tables.add_argument("--on-error", default="raise", help="raise; or null: the reason is in the column .._error")
    tables.add_argument(
        "--rows-per-task", type=int, default=4096, help="rows of a file in a folder, and what a kill costs at most"
    )
    ray = parser.add_argument_group("Ray (pip install gircse[ray])")
    ray.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="encode on a Ray cluster; default: the one of RAY_ADDRESS or of this machine, else one is started",
    )
    ray.add_argument("--id", help="column of unique values, by which a run that goes on knows what is done")
    ray.add_argument("--workers", type=_workers, default=1, help="number of models, or the fewest and the most: 1:8")
    ray.add_argument("--num-gpus", type=float, help="GPUs of each (default: 1 if the cluster has any)")
    ray.add_argument("--num-cpus", type=float, help="CPUs and threads of each (default: 1)")


def _steps(value: str) -> int | str:
    """An integer, or "auto"."""
    return value if value == "auto" else int(value)


def _workers(value: str) -> int | tuple[int, int]:
    """`8`, or `1:8`."""
    low, colon, high = value.partition(":")
    return (int(low), int(high)) if colon else int(low)


def _encode(arguments: argparse.Namespace) -> None:
    from gircse.corpora.part import Part

    part = Part.of(arguments.part)
    suffix = Path(arguments.output).suffix
    if suffix and (output := Path(arguments.output)).is_file():
        from gircse.corpora.objects import find_files

        inputs = [] if "-" in arguments.input else find_files(arguments.input)
        if any(Path(file).exists() and output.samefile(file) for file in inputs):
            raise ValueError(f"output: got {arguments.output}, which is an input, expected another file")
    if arguments.ray is not None:
        if part.count > 1:
            raise ValueError("part: got a share with --ray, expected one of the two: Ray shares the rows itself")
        _encode_on_ray(arguments)
    elif suffix in (".npy", ".jsonl"):
        _encode_texts(arguments, part)
    elif suffix == ".parquet" or not suffix or arguments.output.endswith("/") or Path(arguments.output).is_dir():
        _encode_tables(arguments, part)
    else:
        raise ValueError(
            f"output: got {arguments.output!r}, expected a name that ends in .parquet, .npy or .jsonl, or a folder (no "
            "suffix, or /)"
        )


def _encode_texts(arguments: argparse.Namespace, part: Any) -> None:
    """Into a file that appears when all is encoded."""
    from gircse.corpora.texts import read_corpus
    from gircse.encode.files import embedding_writer

    if "://" in arguments.output:
        raise ValueError(
            f"output: got {arguments.output}, expected a file on a disk, or Parquet, for which a URL will do"
        )
    blocks = read_corpus(arguments.input, arguments.column, part, arguments.rows_per_task)
    first = next(blocks, [])  # a bad file is reported before the model is loaded
    model = load_model(arguments, merge_adapter=True)
    options = {"instruction": arguments.instruction, "num_steps": arguments.num_steps, **_options(arguments)}
    count = 0
    with _progress(None) as bar, embedding_writer(arguments.output) as write:
        block: list[str] | None = first
        while block is not None:
            write(model.encode(block, return_steps=arguments.return_steps, show_progress_bar=False, **options))
            bar.update(len(block))
            count += len(block)
            block = next(blocks, None)
    print(f"encoded {count} texts into {arguments.output}", file=sys.stderr)


def _encode_tables(arguments: argparse.Namespace, part: Any) -> None:
    from gircse.corpora.encode_files import encode_files

    source = _source(arguments)
    with _progress(len(part.of_rows(source.total, arguments.rows_per_task))) as bar:
        report = encode_files(
            source,
            arguments.output,
            _job(arguments),
            part=part,
            rows_per_task=arguments.rows_per_task,
            update=bar.update,
        )
    print(f"encoded {report.encoded} of {report.rows} rows into {arguments.output}", file=sys.stderr)


def _encode_on_ray(arguments: argparse.Namespace) -> None:
    from gircse.corpora.ray_files import encode_files_on_ray

    rows = encode_files_on_ray(
        _source(arguments),
        arguments.output,
        _job(arguments),
        id_column=arguments.id,
        address=arguments.ray or None,
        rows_per_task=arguments.rows_per_task,
        workers=arguments.workers,
        num_gpus=arguments.num_gpus,
        num_cpus=arguments.num_cpus,
    )
    print(f"{rows} rows are in {arguments.output}", file=sys.stderr)


def _source(arguments: argparse.Namespace) -> Any:
    from gircse.corpora.sources import Source

    if "-" in arguments.input:
        raise ValueError("input: got - (standard input), expected files, which a run that goes on reads again")
    return Source.of(arguments.input, arguments.column)


def _job(arguments: argparse.Namespace) -> Any:
    from gircse.corpora.job import EncodeJob, path_of

    return EncodeJob(
        path_of(arguments.model),
        adapter=arguments.adapter and path_of(arguments.adapter),
        columns={arguments.column: arguments.output_column},
        instruction=arguments.instruction,
        num_steps=arguments.num_steps,
        return_steps=arguments.return_steps,
        load={
            "dtype": arguments.dtype,
            "trust_remote_code": arguments.trust_remote_code,
            **({} if arguments.device is None else {"device": arguments.device}),
        },
        encode=_options(arguments),
        output_dtype=arguments.output_dtype,
        on_error=arguments.on_error,
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"normalize": not arguments.no_normalize, **{name: getattr(arguments, name) for name in _ENCODE}}


def _progress(total: int | None) -> Any:
    """A bar on a terminal, nothing elsewhere."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="encode", unit="row", dynamic_ncols=True, disable=None)
