#!/usr/bin/env python
"""Jacobi decoding against one soft token after the other: time, and what it changes.

    python bench/jacobi.py speed --shape qwen2.5-0.5b --dtype bfloat16 --rows 1 64 --length 32
    python bench/jacobi.py speed --base BASE --adapter ADAPTER --rows 1 2 4 8 16 64 --steps 5 10 20
    python bench/jacobi.py quality --base BASE --adapters FOLDER --corpora code.json packages.json --out RECORD

`speed` takes random weights, which do not settle as trained ones do, or a trained adapter. For each tolerance it prints
the passes that the texts took and the seconds of an encoding, prompt included, in turn with the sequential one's.
`quality` takes every adapter below a folder (and the base without one) and the test set of the corpus whose name is in
the adapter's path, and measures passes, 1 - cosine to the sequential embedding and nDCG@10; for each start of the
passes that was tried, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.jacobi_quality import COLUMNS, START_COLUMNS, measure, measure_starts, test_set
from bench.provenance import provenance
from bench.records import save
from bench.shapes import SHAPES, random_model
from bench.tables import Column, column, table
from bench.timing import seconds
from gircse.engine import Engine, Jacobi
from gircse.lm.causal_lm import CausalLM
from gircse.model import GIRCSE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 2 bad options."""
    parser = argparse.ArgumentParser(prog="bench/jacobi.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    speed.add_argument("--layers", type=int, help="cut the shape to so many")
    speed.add_argument("--adapter", type=Path)
    speed.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    speed.add_argument("--length", type=int, default=40, help="tokens of each text (default: %(default)s)")
    speed.add_argument("--steps", type=int, nargs="+", default=[20])
    speed.add_argument("--tolerances", type=float, nargs="+", default=[1e-3])
    speed.add_argument("--repeats", type=int, default=7)
    quality = commands.add_parser("quality")
    quality.add_argument("--adapters", type=Path, required=True, help="folder of trained models")
    quality.add_argument("--corpora", type=Path, nargs="+", required=True, help="files of `StudyCorpus.save`")
    quality.add_argument("--texts", type=int, help="so many queries and documents at most")
    quality.add_argument("--start-texts", type=int, default=64, help="of the comparison of starts")
    quality.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    quality.add_argument("--tolerances", type=float, nargs="+", default=[2, 1e-2, 3e-3, 1e-3])
    for command in (speed, quality):
        command.add_argument("--base", help="folder of the base model")
        command.add_argument("--dtype", choices=DTYPES, default="float32")
        command.add_argument("--out", type=Path, help="file of the record")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"benchmark": "jacobi", "kind": options.command, "dtype": options.dtype}
    record |= (measure_speed if options.command == "speed" else measure_quality)(options, device)
    record["provenance"] = provenance(device, "jacobi")
    if options.out:
        save(record, options.out)
    return 0


def measure_speed(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if options.shape:
        model = random_model(SHAPES[options.shape].config(options.layers), dtype=DTYPES[options.dtype], device=device)
        lm = CausalLM.from_model(model)
    else:
        lm = _trained(options, options.adapter, device).causal_lm
    engine, generator = Engine(lm), torch.Generator().manual_seed(0)
    points = []
    for rows in options.rows:
        texts = torch.randint(3, lm.vocabulary, (rows, options.length), generator=generator).tolist()
        for steps in options.steps:
            plans: dict[float | None, Jacobi | None] = {None: None}
            plans |= {tolerance: Jacobi("mean", tolerance) for tolerance in options.tolerances}
            passes: dict[float | None, float] = {}
            for tolerance, jacobi in plans.items():
                before = _total(engine)
                engine.states(texts, steps, jacobi=jacobi)
                passes[tolerance] = (_total(engine) - before) / rows
                engine.states(texts, steps, jacobi=jacobi)  # a prefill is captured in the second batch of its bucket
                engine.states(texts, steps, jacobi=jacobi)
            runs: dict[float | None, list[float]] = {tolerance: [] for tolerance in plans}
            for _ in range(options.repeats):
                for tolerance, jacobi in plans.items():
                    runs[tolerance].append(seconds(partial(engine.states, texts, steps, jacobi=jacobi), device))
            sequential = statistics.median(runs[None])
            points += [
                {"rows": rows, "length": options.length, "num_steps": steps, "tolerance": tolerance}
                | {"passes": passes[tolerance], "seconds": statistics.median(runs[tolerance]), "runs": runs[tolerance]}
                | {"sequential_seconds": sequential, "sequential_runs": runs[None]}
                for tolerance in options.tolerances
            ]
            print(table(SPEED_COLUMNS, points[-len(options.tolerances) :]), flush=True)
    launches = [cost for cost in engine.report().steps if cost.tokens > 1]
    print("kernels of a captured pass:", sorted({cost.launches for cost in launches}) or "none is captured")
    model_name = options.shape or str(options.adapter or options.base)
    return {"model": model_name, "points": points, "pass_launches": [cost._asdict() for cost in launches]}


def _trained(options: argparse.Namespace, adapter: Path | None, device: torch.device) -> GIRCSE:
    return GIRCSE.from_pretrained(
        options.base, adapter=adapter, dtype=options.dtype, device=device, merge_adapter=adapter is not None
    )


def _total(engine: Engine) -> int:
    """Passes of all texts so far."""
    return sum(passes * texts for passes, texts in engine.report().passes.items())


SPEED_COLUMNS: list[Column] = [
    column("texts", "rows"),
    column("tokens", "length"),
    column("K", "num_steps"),
    column("tolerance", "tolerance", "{:g}"),
    column("passes", "passes", "{:.1f}"),
    column("sequential ms", "sequential_seconds", "{:.1f}", 1e3),
    column("Jacobi ms", "seconds", "{:.1f}", 1e3),
    ("sequential / Jacobi", lambda point: f"{point['sequential_seconds'] / point['seconds']:.2f}"),
]


def measure_quality(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    found: dict[str, list[Any]] = {"points": [], "starts": []}
    trained = sorted(path.parent for path in options.adapters.rglob("adapter_config.json"))
    for path in options.corpora:
        corpus = test_set(path, options.texts)
        mine = [folder for folder in trained if corpus.name in str(folder.relative_to(options.adapters))]
        for folder in [None, *mine]:
            model = _trained(options, folder, device)
            name = "untrained" if folder is None else str(folder.relative_to(options.adapters))
            what = {"model": name, "corpus": corpus.name}
            points = [what | point for point in measure(model, corpus, options.steps, options.tolerances)]
            texts = corpus.documents[: options.start_texts]
            starts = [what | point for point in measure_starts(model, texts, max(options.steps))]
            print(table(COLUMNS, points), table(START_COLUMNS, starts), sep="\n\n", end="\n\n", flush=True)
            found["points"] += points
            found["starts"] += starts
    return found


if __name__ == "__main__":
    sys.exit(main())
