"""The command line of `bench/run.py`: every default, and every check that can be made before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig

from bench.batches import DISTRIBUTIONS, FIXED, LOGNORMAL, draw_lengths
from bench.engines import ENGINES, GRAPH, NO_REUSE, OFFICIAL_EVAL, REFERENCE, SINGLE_PASS
from bench.provenance import ROOT
from bench.shapes import SHAPES, pretrained_config
from gircse.lm.load import is_local

DTYPES = ("float32", "bfloat16", "float16", "float64")
OFFICIAL = "recompute-official"
SUFFIXES = (".txt", ".jsonl")
CORPUS_ENGINES = [OFFICIAL_EVAL, GRAPH]

_DESCRIPTION = """\
Encoding throughput and latency against K, engine against engine; with --train the time and peak memory of one training
step instead, with --corpus the texts of a file through a real tokenizer. Afterwards the engines are held against the
reference algorithm (with --corpus against each other, on every text); one that disagrees is marked WRONG, one that
could not be compared UNCHECKED (exit code 1). The last line on stdout is the record as JSON."""


_BATCH = "texts in a batch (default 4), with --train queries, with --corpus of official-eval (default 32)"
_DISTRIBUTION = "of lengths: fixed N (default), lognormal (median N/3) or uniform over 1 to N; padded on the left"
_PREFIX = f"all texts start with the same P tokens; adds {NO_REUSE} to the default engines"
_STEPS = "default 0 1 2 5 10, with --corpus 0 20; with --train default 5"
_ENGINES = "default: single-pass recompute official-eval cached graph; with --train recompute cached"
_LATENCY = (
    "runs of one text alone, each engine: default 20, on a CPU 5 and only at the least and the largest K; 0: none"
)


class Parser(argparse.ArgumentParser):
    """One line per error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, PretrainedConfig]:
    """-> options with every default filled in, the model's config. Exits with code 2 and one line on a bad option."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        _check_given(options)
        _fill(options)
        config = _check(options)
    except (ValueError, OSError) as error:
        parser.error(str(error).strip().splitlines()[0])
    return options, config


def _parser() -> Parser:
    engines = "\n".join(f"  {name:<20}{engine.summary}" for name, engine in ENGINES.items())
    parser = Parser(
        prog="bench/run.py",
        description=_DESCRIPTION,
        epilog=f"engines:\n{engines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real shape (default: smollm2-135m)")
    what.add_argument("--model", metavar="PATH", help="a local folder or hub name, with its own weights")
    add("--layers", type=int, metavar="N", help="keep the first N decoder layers only: a quick look, recorded as such")
    add("--train", action="store_true", help="one training step instead: time and peak memory")
    add("--corpus", type=Path, metavar="FILE", help="real texts instead (.txt one a line, .jsonl), with --model PATH")
    add("--field", metavar="NAME", help="--corpus: the texts' field in .jsonl (default text)")
    add("--instruction", metavar="STR", help="--corpus: what the embeddings are for (default: none, bare texts)")
    add("--limit", type=int, metavar="N", help="--corpus: the first N texts (default: all)")
    add("--batch", type=int, metavar="B", help=_BATCH)
    add("--negatives", type=int, metavar="H", help="--train: hard negatives per query, beside its positive (default 1)")
    add("--length", type=int, metavar="N", help="prompt tokens of a text (default 64); --corpus: at most (default 512)")
    add("--distribution", choices=DISTRIBUTIONS, help=_DISTRIBUTION)
    add("--mixed", action="store_const", const=LOGNORMAL, dest="distribution", help="the same as lognormal")
    add("--prefix-reuse", type=int, metavar="P", help=_PREFIX)
    add("--steps", type=int, nargs="+", metavar="K", help=_STEPS)
    add("--engines", nargs="+", metavar="NAME", help=_ENGINES)
    add("--official-waste", action="store_true", help=f"add {OFFICIAL}: with what the reference computes for nothing")
    add(
        "--checkpointing",
        nargs="*",
        metavar="NAME",
        help="--train: recompute the prompt pass in backward, in all engines or in these",
    )
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    add("--device", help="default: cuda if there is one, else cpu")
    add(
        "--repeats",
        type=int,
        metavar="R",
        help="timed runs of each point, interleaved (default 3, CUDA 10, --corpus 1)",
    )
    add("--latency", type=int, metavar="RUNS", help=_LATENCY)
    add("--seed", type=int, default=0, help="of weights, tokens and lengths (default 0)")
    add("--out", type=Path, metavar="FILE", help="the record as JSON (default: runs/bench/ in the checkout)")
    add("--plot", type=Path, metavar="FILE", help="PNG (default: beside --out)")
    return parser


def _fill(options: argparse.Namespace) -> None:
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    if options.model is None:
        options.shape = options.shape or "smollm2-135m"
    mode = "train" if options.train else "corpus" if options.corpus is not None else "throughput"
    _default(options, "steps", {"train": [5], "corpus": [0, 20]}.get(mode, [0, 1, 2, 5, 10]))
    _default(options, "batch", 32 if mode == "corpus" else 4)
    _default(options, "length", 512 if mode == "corpus" else 64)
    _default(options, "distribution", FIXED)
    _default(options, "repeats", 1 if mode == "corpus" else 10 if cuda else 3)
    _default(options, "field", "text")
    if mode == "throughput":
        _default(options, "prefix_reuse", 0)
        _default(options, "latency", 20 if cuda else 5)
    _default(options, "engines", _default_engines(mode, options.prefix_reuse))
    if options.official_waste and OFFICIAL not in options.engines:
        options.engines = [*options.engines, OFFICIAL]
    options.name = options.shape or Path(options.model).name
    if options.out is None:
        folder = options.plot.parent if options.plot is not None else ROOT / "runs" / "bench"
        options.out = folder / f"{mode}-{options.name}-{options.dtype}-{options.device.replace(':', '')}.json"
    if options.plot is None:
        options.plot = options.out.with_suffix(".png")


def _default(options: argparse.Namespace, name: str, value: Any) -> None:
    if getattr(options, name) is None:
        setattr(options, name, value)


def _default_engines(mode: str, prefix_reuse: int | None) -> list[str]:
    if mode == "train":
        return [REFERENCE, "cached"]
    if mode == "corpus":
        return CORPUS_ENGINES
    return [SINGLE_PASS, REFERENCE, OFFICIAL_EVAL, "cached", GRAPH, *([NO_REUSE] if prefix_reuse else [])]


def _check(options: argparse.Namespace) -> PretrainedConfig:
    for name, least in (("batch", 1), ("length", 1), ("repeats", 1), ("seed", 0)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name}: got {value}, expected at least {least}")
    if min(options.steps) < 0:
        raise ValueError(f"--steps: got {min(options.steps)}, expected at least 0")
    options.steps = sorted(set(options.steps))
    _check_mode(options)
    if options.corpus is not None:
        _check_corpus(options)
    elif not options.train:
        _check_prefix(options)
    _check_engines(options)
    _check_device(options.device)
    for name in ("out", "plot"):
        if getattr(options, name).is_dir():
            raise ValueError(f"--{name}: {getattr(options, name)} is a folder, expected a file")
    if options.plot == options.out:
        raise ValueError(f"--plot: got the same file as --out, {options.out}")
    if options.model is not None:
        if is_local(options.model) and not Path(options.model).is_dir():
            raise ValueError(f"--model: {options.model} does not exist or is not a folder")
        config = pretrained_config(options.model, options.layers)
    else:
        config = SHAPES[options.shape].config(options.layers)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and options.length + max(options.steps) > positions:
        raise ValueError(
            f"--length: {options.length} and {max(options.steps)} steps pass the model's {positions} positions"
        )
    return config


def _check_given(options: argparse.Namespace) -> None:
    """Options that belong to another mode, and --corpus without its model; before defaults are filled in."""
    if options.corpus is not None:
        others = ("shape", "layers", "train", "engines", "official_waste", "distribution", "prefix_reuse", "latency")
        for name in others:
            if getattr(options, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} does not go with --corpus")
        if options.model is None:
            raise ValueError("--corpus needs --model PATH, a local folder with a tokenizer")
    else:
        for name in ("field", "instruction", "limit"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} belongs to --corpus")
    if options.train:
        for name in ("prefix_reuse", "latency"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --train")
    elif options.negatives is not None or options.checkpointing is not None:
        raise ValueError("--negatives and --checkpointing belong to --train")


def _check_corpus(options: argparse.Namespace) -> None:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: got {options.limit}, expected at least 1")
    if not options.corpus.is_file():
        raise ValueError(f"--corpus: {options.corpus} does not exist or is not a file")
    if options.corpus.suffix not in SUFFIXES:
        raise ValueError(f"--corpus: got {options.corpus}, expected {' or '.join(SUFFIXES)}")
    if not Path(options.model).is_dir():
        raise ValueError(f"--model: {options.model} does not exist or is not a folder")


def _check_prefix(options: argparse.Namespace) -> None:
    for name in ("prefix_reuse", "latency"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least 0")
    lengths = draw_lengths(options.batch, options.length, distribution=options.distribution, seed=options.seed)
    if options.prefix_reuse and options.prefix_reuse >= min(lengths):
        raise ValueError(
            f"--prefix-reuse: got {options.prefix_reuse}, expected less than the shortest text's {min(lengths)} tokens"
        )


def _check_mode(options: argparse.Namespace) -> None:
    options.negatives = 1 if options.negatives is None else options.negatives
    if options.negatives < 0:
        raise ValueError(f"--negatives: got {options.negatives}, expected at least 0")


def _check_engines(options: argparse.Namespace) -> None:
    options.engines = list(dict.fromkeys(options.engines))
    if options.checkpointing is not None:
        options.checkpointing = options.checkpointing or options.engines
        for name in options.checkpointing:
            if name not in options.engines:
                raise ValueError(f"--checkpointing: got {name!r}, expected {', '.join(options.engines)}")
    known = [name for name, engine in ENGINES.items() if engine.trains or not options.train]
    for name in options.engines:
        if name not in known:
            raise ValueError(f"--engines: got {name!r}, expected {', '.join(known)}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: got {name!r}, expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: got {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
