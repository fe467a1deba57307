#!/usr/bin/env python
"""Jacobi decoding against one soft token after the other: time, and what it changes.

    python bench/jacobi.py speed --shape qwen2.5-0.5b --dtype bfloat16 --rows 1 64 --length 32
    python bench/jacobi.py speed --base BASE --adapter ADAPTER --rows 1 2 4 8 16 64 --steps 5 10 20
    python bench/jacobi.py quality --base BASE --adapters code-0 packages-0 --corpora code.json packages.json

`speed` takes random weights, which do not settle as trained ones do, or a trained adapter, and random tokens or those
of a corpus. For each tolerance it prints the passes that the texts took and the seconds of an encoding, prompt
included, in turn with the sequential one's, and whether decoding="auto" would take the passes.
`quality` takes for each trained model (and the base without an adapter) the test set of the corpus whose name that of
its folder begins with, and measures passes, 1 - cosine to the sequential embedding and nDCG@10; for the base and the
first model of each corpus also each start of the passes that was tried. The record is saved after each model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
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
from gircse.encode.tokens import tokenize
from gircse.engine import Engine, Jacobi
from gircse.engine.jacobi import is_faster
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
    speed.add_argument("--corpus", type=Path, help="a file of `StudyCorpus.save`, whose documents are the texts")
    speed.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    speed.add_argument("--length", type=int, default=40, help="tokens of each text (default: %(default)s)")
    speed.add_argument("--steps", type=int, nargs="+", default=[20])
    speed.add_argument("--tolerances", type=float, nargs="+", default=[1e-3])
    speed.add_argument("--repeats", type=int, default=7, help="with one text; fewer with more, but 3 at least")
    quality = commands.add_parser("quality")
    quality.add_argument("--adapters", type=Path, nargs="+", required=True, help="folders of trained models, in order")
    quality.add_argument("--corpora", type=Path, nargs="+", required=True, help="files of `StudyCorpus.save`")
    quality.add_argument("--texts", type=int, help="so many queries and documents at most")
    quality.add_argument("--untrained-texts", type=int, default=24, help="of the base (default: %(default)s)")
    quality.add_argument("--start-texts", type=int, default=16, help="of the comparison of starts")
    quality.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20], help="ascending")
    quality.add_argument("--tolerances", type=float, nargs="+", default=[1e-2, 3e-3, 1e-3, 3e-4])
    for command in (speed, quality):
        command.add_argument("--base", help="folder of the base model")
        command.add_argument("--dtype", choices=DTYPES, default="float32")
        command.add_argument("--out", type=Path, help="file of the record")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"benchmark": "jacobi", "kind": options.command, "dtype": options.dtype}
    record["provenance"] = provenance(device, "jacobi")
    for found in (measure_speed if options.command == "speed" else measure_quality)(options, device):
        if options.out:
            save(record | found, options.out)
    return 0


def measure_speed(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The record's fields so far, after each number of rows and K."""
    generator, most = torch.Generator().manual_seed(0), max(options.rows)
    if options.shape:
        model = random_model(SHAPES[options.shape].config(options.layers), dtype=DTYPES[options.dtype], device=device)
        lm = CausalLM.from_model(model)
    else:
        trained = _trained(options, options.adapter, device)
        lm = trained.causal_lm
    texts = torch.randint(3, lm.vocabulary, (max(most, 16), options.length), generator=generator).tolist()
    if options.corpus:
        documents = test_set(options.corpus, None).documents
        lengths = {"max_length": options.length, "num_steps": max(options.steps)}
        rows = tokenize(trained, documents, instruction=None, **lengths)
        texts = [row for row in rows if len(row) == options.length]
    engine = Engine(lm)
    size = sum(parameter.numel() for parameter in lm.body.parameters())
    plans = {None: None} | {tolerance: Jacobi("mean", tolerance) for tolerance in options.tolerances}
    points: list[dict[str, Any]] = []
    for rows in options.rows:
        repeats = max(3, options.repeats // rows)
        batches = [
            [texts[(start + row) % len(texts)] for row in range(rows)] for start in range(0, rows * repeats, rows)
        ]
        for steps in options.steps:
            for jacobi in plans.values():
                for _ in range(3 if device.type == "cuda" else 1):  # the second batch of a bucket captures its prefill
                    engine.states(batches[0], steps, jacobi=jacobi)
            runs: dict[float | None, list[float]] = {tolerance: [] for tolerance in plans}
            passes = dict.fromkeys(plans, 0)
            for batch in batches:
                for tolerance, jacobi in plans.items():
                    so_far = _total(engine)
                    runs[tolerance].append(seconds(partial(engine.states, batch, steps, jacobi=jacobi), device))
                    passes[tolerance] += _total(engine) - so_far
            sequential = statistics.median(runs[None])
            for tolerance in options.tolerances:
                taken = passes[tolerance] / (rows * repeats)
                point = {"rows": rows, "length": options.length, "num_steps": steps, "tolerance": tolerance}
                point |= {"passes": taken, "seconds": statistics.median(runs[tolerance]), "runs": runs[tolerance]}
                point |= {"sequential_seconds": sequential, "sequential_runs": runs[None]}
                point |= {"auto": is_faster(device.type, size, rows, steps, taken)}
                points.append(point)
            print(table(SPEED_COLUMNS, points[-len(options.tolerances) :]), flush=True)
            launches = [cost._asdict() for cost in engine.report().steps if cost.tokens > 1]
            model_name = options.shape or str(options.adapter or options.base)
            yield {"model": model_name, "points": points, "pass_launches": launches}


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
    ("auto", lambda point: "Jacobi" if point["auto"] else "sequential"),
]


def measure_quality(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The record's fields so far, after each model."""
    found: dict[str, list[Any]] = {"points": [], "starts": []}
    paths = {path.stem: path for path in options.corpora}
    models = [(None, name, options.untrained_texts) for name in paths]
    models += [(folder, folder.name.split("-")[0], options.texts) for folder in options.adapters]
    seen: set[tuple[bool, str]] = set()
    for folder, name, count in models:
        corpus = test_set(paths[name], count)
        model, started = _trained(options, folder, device), time.process_time()
        what = {"model": "untrained" if folder is None else "/".join(folder.parts[-2:]), "corpus": corpus.name}
        points = [what | point for point in measure(model, corpus, options.steps, options.tolerances)]
        print(table(COLUMNS, points), f"{time.process_time() - started:.0f} s", sep="\n", flush=True)
        found["points"] += points
        if (folder is None, name) not in seen:
            seen.add((folder is None, name))
            texts = corpus.documents[: options.start_texts]
            starts = [what | point for point in measure_starts(model, texts, max(options.steps))]
            print(table(START_COLUMNS, starts), f"{time.process_time() - started:.0f} s", sep="\n", flush=True)
            found["starts"] += starts
        yield found


if __name__ == "__main__":
    sys.exit(main())
