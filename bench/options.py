"""The command line of `bench/run.py`: every default, and every check that can be made before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig

from bench.batches import DISTRIBUTIONS, FIXED, LOGNORMAL, draw_lengths
from bench.engines import CACHED, ENGINES, GRAPH, NO_REUSE, OFFICIAL_EVAL, REFERENCE, SINGLE_PASS
from bench.provenance import ROOT
from bench.shapes import SHAPES, pretrained_config
from bench.sweep import KINDS, NAMES
from gircse.lm.load import is_local

DTYPES = ("float32", "bfloat16", "float16", "float64")
SUFFIXES = (".txt", ".jsonl")
CORPUS_ENGINES = [OFFICIAL_EVAL, GRAPH]

# Modes: "throughput" without any of the options --train, --corpus, --sweep. What does not go with every mode:
_GOES_WITH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("shape", "layers", "quick"), ("throughput", "train", "sweep")),
    **dict.fromkeys(("model", "batch", "length", "steps", "plot"), ("throughput", "train", "corpus")),
    **dict.fromkeys(("distribution", "engines"), ("throughput", "train")),
    **dict.fromkeys(("prefix_reuse", "latency"), ("throughput",)),
    **dict.fromkeys(("negatives", "checkpointing"), ("train",)),
    **dict.fromkeys(("field", "instruction", "limit"), ("corpus",)),
}
_LEAST = {"batch": 1, "length": 1, "repeats": 1, "limit": 1, "seed": 0, "negatives": 0, "prefix_reuse": 0, "latency": 0}

_DESCRIPTION = """\
Encoding throughput and latency against K, engine against engine; with --train the time and peak memory of one training
step instead, with --corpus the texts of a file through a real tokenizer. Afterwards the engines are held against the
reference algorithm (with --corpus against each other, on every text); one that disagrees is marked WRONG, one that
could not be compared UNCHECKED (exit code 1). The last line on stdout is the record as JSON. --sweep measures scaling
curves instead, of encoding, the training step and soft_embed, and leaves a record for each of them."""


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
    add, what, mode = parser.add_argument, parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real shape (default: smollm2-135m)")
    what.add_argument("--model", metavar="PATH", help="a local folder or hub name, with its own weights")
    mode.add_argument("--train", action="store_true", help="one training step instead: time and peak memory")
    mode.add_argument("--corpus", type=Path, metavar="FILE", help="real texts instead (.txt one a line, .jsonl)")
    mode.add_argument("--sweep", nargs="*", metavar="CURVE", help="scaling curves instead: encode.K train ..; or all")
    for name, kind, metavar, text in (
        ("layers", int, "N", "keep the first N decoder layers only: a quick look, recorded as such"),
        ("field", str, "NAME", "--corpus: the texts' field in .jsonl (default text)"),
        ("instruction", str, "STR", "--corpus: what the embeddings are for (default: none, bare texts)"),
        ("limit", int, "N", "--corpus: the first N texts (default: all)"),
        ("batch", int, "B", "texts in a batch (default 4); --train: queries; --corpus: of official-eval (default 32)"),
        ("negatives", int, "H", "--train: hard negatives per query, beside its positive (default 1)"),
        ("length", int, "N", "prompt tokens of a text (default 64); --corpus: at most (default 512)"),
        ("prefix-reuse", int, "P", f"all texts start with the same P tokens; adds {NO_REUSE} to the default engines"),
        ("device", str, "NAME", "default: cuda if there is one, else cpu"),
        ("repeats", int, "R", "timed runs of each point, interleaved (default 3, CUDA 10, --corpus 1)"),
        ("latency", int, "RUNS", "runs of one text alone: default 20, on a CPU 5 at the least and the largest K only"),
        ("seed", int, "S", "of weights, tokens and lengths (default 0)"),
        ("out", Path, "FILE", "the record as JSON (default: in runs/bench/); --sweep: a folder"),
        ("plot", Path, "FILE", "PNG (default: beside --out)"),
    ):
        add(f"--{name}", type=kind, metavar=metavar, help=text)
    add("--steps", type=int, nargs="+", metavar="K", help="default 0 1 2 5 10, --corpus 0 20, --train 5")
    add("--engines", nargs="+", metavar="NAME", help="default: those that docs/performance.md shows")
    add("--checkpointing", nargs="*", metavar="NAME", help="--train: recompute in backward, in all engines or in these")
    add("--distribution", choices=DISTRIBUTIONS, help="of lengths up to N: fixed (default), lognormal, uniform")
    add("--mixed", action="store_const", const=LOGNORMAL, dest="distribution", help="the same as lognormal")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    add("--quick", action="store_true", help="a look in 20 seconds: few layers and steps, one run; recorded as such")
    return parser


def _given(options: argparse.Namespace, name: str) -> bool:
    value = getattr(options, name)
    return value is not None and value is not False


def _check_given(options: argparse.Namespace) -> None:
    """Refuses options that belong to another mode, before defaults are filled in."""
    mode = next((name for name in ("train", "corpus", "sweep") if _given(options, name)), "throughput")
    options.mode = mode
    for name, modes in _GOES_WITH.items():
        if mode not in modes and _given(options, name):
            rest = f"belongs to --{modes[0]}" if mode == "throughput" else f"does not go with --{mode}"
            raise ValueError(f"--{name.replace('_', '-')} {rest}")
    if mode == "corpus" and options.model is None:
        raise ValueError("--corpus needs --model PATH, a local folder with a tokenizer")
    for name in options.sweep or ():
        if name not in (*KINDS, *NAMES):
            raise ValueError(f"--sweep: got {name!r}, expected some of {', '.join((*KINDS, *NAMES))}")


def _fill(options: argparse.Namespace) -> None:
    mode = options.mode
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = options.device.startswith("cuda")
    if options.model is None:
        options.shape = options.shape or ("qwen2.5-0.5b" if cuda and mode == "sweep" else "smollm2-135m")
    options.name = options.shape or Path(options.model).name
    engines = {"train": [REFERENCE, CACHED], "corpus": CORPUS_ENGINES}.get(mode)
    reuse = [NO_REUSE] if options.prefix_reuse else []
    defaults: dict[str, Any] = {
        "dtype": "bfloat16" if cuda else "float32",
        "steps": {"train": [5], "corpus": [0, 20]}.get(mode, [0, 1, 2, 5, 10]),
        "batch": 32 if mode == "corpus" else 4,
        "length": 512 if mode == "corpus" else 64,
        "distribution": FIXED,
        "repeats": 1 if mode == "corpus" else 3 if not cuda else 7 if mode == "sweep" else 10,
        "field": "text",
        "seed": 0,
        "negatives": 1,
        "prefix_reuse": 0,
        "latency": 20 if cuda else 5,
        "engines": engines or [SINGLE_PASS, REFERENCE, OFFICIAL_EVAL, CACHED, GRAPH, *reuse],
    }
    if options.quick:
        defaults |= {"layers": 1 if mode == "sweep" else 6, "repeats": 1, "batch": 2}
        defaults |= {"steps": [0, 5], "latency": 0} if mode == "throughput" else {}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.engines = list(dict.fromkeys(options.engines))
    if options.checkpointing is not None:
        options.checkpointing = options.checkpointing or options.engines
    options.steps = sorted(set(options.steps))
    if options.out is None:
        folder = options.plot.parent if options.plot is not None else ROOT / "runs" / "bench"
        name = f"{mode}-{options.name}-{options.dtype}-{options.device.replace(':', '')}.json"
        if mode == "sweep":
            name = f"scaling{'-quick' if options.quick else ''}-{options.device.replace(':', '')}"
        options.out = folder / name
    options.plot = options.plot or options.out.with_suffix(".png")


def _check(options: argparse.Namespace) -> PretrainedConfig:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected at least {least}")
    if min(options.steps) < 0:
        raise ValueError(f"--steps: got {min(options.steps)}, expected at least 0")
    known = [name for name, engine in ENGINES.items() if engine.trains or not options.train]
    for option, names, expected in (
        ("engines", options.engines, known),
        ("checkpointing", options.checkpointing or (), options.engines),
    ):
        for name in names:
            if name not in expected:
                raise ValueError(f"--{option}: got {name!r}, expected {', '.join(expected)}")
    if options.mode == "throughput":
        lengths = draw_lengths(options.batch, options.length, distribution=options.distribution, seed=options.seed)
        if options.prefix_reuse and options.prefix_reuse >= min(lengths):
            raise ValueError(
                f"--prefix-reuse: got {options.prefix_reuse}, expected less than the shortest text's {min(lengths)} "
                "tokens"
            )
    _check_device(options.device)
    _check_files(options)
    config = pretrained_config(options.model, options.layers) if options.model else SHAPES[options.shape].config(
        options.layers
    )  # fmt: skip
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and options.length + max(options.steps) > positions:
        raise ValueError(
            f"--length: {options.length} and {max(options.steps)} steps pass the model's {positions} positions"
        )
    return config


def _check_files(options: argparse.Namespace) -> None:
    for name in ("out", "plot") if options.mode != "sweep" else ():
        if getattr(options, name).is_dir():
            raise ValueError(f"--{name}: {getattr(options, name)} is a folder, expected a file")
    if options.plot == options.out:
        raise ValueError(f"--plot: got the same file as --out, {options.out}")
    if options.corpus is not None:
        if not options.corpus.is_file():
            raise ValueError(f"--corpus: {options.corpus} does not exist or is not a file")
        if options.corpus.suffix not in SUFFIXES:
            raise ValueError(f"--corpus: got {options.corpus}, expected {' or '.join(SUFFIXES)}")
    local = options.model is not None and (is_local(options.model) or options.corpus is not None)
    if local and not Path(options.model).is_dir():
        raise ValueError(f"--model: {options.model} does not exist or is not a folder")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: got {name!r}, expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: got {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
