"""The command line of `bench/run.py`: every default, and every check that can be made before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PretrainedConfig

from bench.engines import ENGINES, REFERENCE, SINGLE_PASS
from bench.provenance import ROOT
from bench.shapes import SHAPES, pretrained_config
from gircse.loading import is_local

DTYPES = ("float32", "bfloat16", "float16", "float64")
OFFICIAL = "recompute-official"

_DESCRIPTION = """\
Encoding throughput against K, or with --train the time and peak memory of one training step, engine against engine.
The engines are first held against the reference algorithm; where they disagree no speed is printed (exit code 1).
The last line on stdout is the record as JSON."""


class Parser(argparse.ArgumentParser):
    """One line per error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, PretrainedConfig]:
    """-> options with every default filled in, the model's config. Exits with code 2 and one line on a bad option."""
    parser = _parser()
    options = parser.parse_args(argv)
    _fill(options)
    try:
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
    add("--batch", type=int, metavar="B", help="texts in a batch, with --train queries (default 4)")
    add("--negatives", type=int, metavar="H", help="--train: hard negatives per query, beside its positive (default 1)")
    add("--length", type=int, default=64, metavar="N", help="prompt tokens of a text (default 64)")
    add("--mixed", action="store_true", help="lengths of up to N instead: log-normal, median N/3, padded on the left")
    add("--steps", type=int, nargs="+", metavar="K", help="default 0 1 2 5 10; with --train one, default 5")
    add("--engines", nargs="+", metavar="NAME", help="default: single-pass recompute cached; with --train the last two")
    add("--official-waste", action="store_true", help=f"add {OFFICIAL}: with what the reference computes for nothing")
    add("--checkpointing", action="store_true", help="--train: recompute the prompt pass in backward")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--repeats", type=int, metavar="R", help="timed runs of each point, interleaved (default 3, on CUDA 10)")
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
    options.steps = options.steps or ([5] if options.train else [0, 1, 2, 5, 10])
    options.batch = 4 if options.batch is None else options.batch
    options.repeats = (10 if cuda else 3) if options.repeats is None else options.repeats
    default = [REFERENCE, "cached"] if options.train else [SINGLE_PASS, REFERENCE, "cached"]
    options.engines = options.engines or default
    if options.official_waste and OFFICIAL not in options.engines:
        options.engines = [*options.engines, OFFICIAL]
    options.name = options.shape or Path(options.model).name
    if options.out is None:
        mode = "train" if options.train else "throughput"
        folder = options.plot.parent if options.plot is not None else ROOT / "runs" / "bench"
        options.out = folder / f"{mode}-{options.name}-{options.dtype}-{options.device.replace(':', '')}.json"
    if options.plot is None:
        options.plot = options.out.with_suffix(".png")


def _check(options: argparse.Namespace) -> PretrainedConfig:
    for name, least in (("batch", 1), ("length", 1), ("repeats", 1), ("seed", 0)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name}: got {value}, expected at least {least}")
    least = 1 if options.train else 0
    if min(options.steps) < least:
        raise ValueError(f"--steps: got {min(options.steps)}, expected at least {least}")
    options.steps = sorted(set(options.steps))
    _check_mode(options)
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


def _check_mode(options: argparse.Namespace) -> None:
    if options.train and len(options.steps) > 1:
        raise ValueError(f"--steps: got {len(options.steps)} values, expected one with --train")
    if not options.train and (options.negatives is not None or options.checkpointing):
        raise ValueError("--negatives and --checkpointing belong to --train")
    options.negatives = 1 if options.negatives is None else options.negatives
    if options.negatives < 0:
        raise ValueError(f"--negatives: got {options.negatives}, expected at least 0")


def _check_engines(options: argparse.Namespace) -> None:
    options.engines = list(dict.fromkeys(options.engines))
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
