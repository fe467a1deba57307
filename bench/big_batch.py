#!/usr/bin/env python
"""A contrastive batch larger than the memory: gradient caching against one-shot micro-batches of the same total.

    PYTHONPATH=.:kernels python bench/big_batch.py --out bench/results/big-batch-cpu.json

One process each, so that the peak of its memory is its own: the whole batch by gradient caching; the same texts in
micro-batches that are contrastive batches of their own (that cost less, and train less: a query sees few negatives).
The training code itself runs, dropout, diagnostics and all. First the cached gradient is held against the one-shot
gradient of a small batch; where they differ the figures are marked WRONG (exit code 1). The last line is the record
as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.agreement import HALF, OK, TOLERANCES, WRONG, relative_error
from bench.memory import peak, reset_peak
from bench.provenance import ROOT, provenance
from bench.records import save, to_json
from bench.shapes import SHAPES, random_model
from bench.tables import table
from bench.timing import seconds
from gircse.demo.smollm2 import MissingWeights, smollm2_path
from gircse.model import GIRCSE
from gircse.train.config import TrainConfig
from gircse.train.lora import trainable_model
from gircse.train.step import Batch, contrastive_backward
from gircse.train.step_monitor import StepMonitor

CACHED, ONE_SHOT = "gradient-caching", "one-shot"
_TOLERANCE = TOLERANCES[torch.float32].gradient


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 the gradients differ or a process ended early, 2 bad options."""
    options = _parse(argv)
    if options.worker:
        print(json.dumps(_work(options, options.worker)), flush=True)
        return 0
    points = []
    for mode in (CACHED, ONE_SHOT):
        done = subprocess.run(
            [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--worker", mode],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            print(f"bench/big_batch.py: {mode} ended with exit code {done.returncode}", file=sys.stderr)
            return 1
        points.append(json.loads(done.stdout.splitlines()[-1]))
    record = _record(options, points)
    print(table(COLUMNS, points))
    print(
        f"\nstep time: {record['time_ratio']:.3f} x one-shot micro-batches, CPU time (which other processes disturb "
        f"less) {record['cpu_time_ratio']:.3f} x; peak memory "
        f"{record['peak_bytes'] / 1e9:.2f} GB; cached gradient differs by {record['difference']:.1e}"
    )
    if record["verdict"] != OK:
        print(f"{WRONG}: the cached gradient differs by more than {_TOLERANCE:.0e}")
    save(record, options.out)
    print(f"record: {options.out}")
    print(to_json(record), flush=True)
    return 0 if record["verdict"] == OK else 1


def _work(options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """One mode, in this process: -> {"mode", "seconds", "peak_bytes", ..}."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    settings = TrainConfig(
        num_steps=options.steps, batch_size=options.rows, lora_dropout=options.dropout, device=options.device
    )
    model = _model(options, settings)
    texts = max(2, options.tokens // (options.length + options.steps))  # of a micro-batch
    each = max(1, texts // 2)
    cached = replace(settings, micro_batch_tokens=options.tokens)
    difference = _check(model, options, settings) if mode == CACHED else None
    monitor = StepMonitor(device)

    def step(rows: range, settings: TrainConfig) -> None:
        contrastive_backward(model, _batch(options, rows, model), settings, num_steps=options.steps, monitor=monitor)

    step(range(min(each, options.rows)), settings)  # warm-up
    model.zero_grad(set_to_none=True)
    loaded = reset_peak(device)
    monitor.start()
    cpu, scale = time.process_time(), 1.0
    if mode == CACHED:
        took = seconds(lambda: step(range(options.rows), cached), device)
    else:
        starts = range(0, options.rows, each)
        if options.sample is not None:
            scale = len(starts) / len(starts[: options.sample])
            starts = starts[: options.sample]
        took = seconds(lambda: [step(range(s, min(s + each, options.rows)), settings) for s in starts], device)
    return {
        "mode": mode,
        "rows": options.rows,
        "micro_batch_rows": each,
        "seconds": took * scale,
        "cpu_seconds": (time.process_time() - cpu) * scale,
        "measured_share": 1 / scale,
        "texts_per_second": 2 * options.rows / (took * scale),
        "loaded_bytes": loaded,
        "peak_bytes": peak(device),
        "time": {phase: value / took for phase, value in monitor.seconds().items()},
        "entropy": monitor.entropies(),
        "difference": difference,
    }


def _model(options: argparse.Namespace, settings: TrainConfig) -> GIRCSE:
    from gircse.lm.load import load_tokenizer

    folder = smollm2_path()
    if options.layers is None:
        return trainable_model(replace(settings, model=str(folder), dtype=options.dtype)).train()
    config = SHAPES["smollm2-135m"].config(options.layers)
    base = random_model(config, dtype=getattr(torch, options.dtype), device=options.device, seed=0)
    return trainable_model(settings, GIRCSE(base, load_tokenizer(folder))).train()


def _batch(options: argparse.Namespace, rows: range, model: GIRCSE) -> Batch:
    """One query and one positive a row, `length` random tokens each."""
    vocab = model.causal_lm.embed_weight.shape[0]

    def text(number: int) -> list[int]:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(vocab, (options.length,), generator=generator).tolist()

    return Batch(
        [text(2 * row) for row in rows], [text(2 * row + 1) for row in rows], torch.arange(len(rows)), mask=None
    )


def _check(model: GIRCSE, options: argparse.Namespace, settings: TrainConfig) -> float:
    """Relative difference of the LoRA gradients of four rows: cached in passes of three texts, in one piece.

    Of a model in half precision on a float32 copy: its own rounding says nothing about the division of the batch.
    """
    batch, found = _batch(options, range(4), model), []
    exact = copy.deepcopy(model).to(torch.float32) if model.causal_lm.head_weight.dtype in HALF else model
    exact.eval()  # no dropout: it falls on other places in another division of the batch
    for budget in (None, 3 * (options.length + options.steps)):
        contrastive_backward(exact, batch, replace(settings, micro_batch_tokens=budget), num_steps=options.steps)
        found.append(torch.cat([p.grad.reshape(-1) for p in exact.parameters() if p.grad is not None]))
        exact.zero_grad(set_to_none=True)
    model.train()
    return relative_error(found[1], found[0])


def _record(options: argparse.Namespace, points: list[dict[str, Any]]) -> dict[str, Any]:
    cached, one_shot = points
    return {
        "benchmark": "big-batch",
        "provenance": provenance(options.device),
        "model": {"name": "smollm2-135m", "layers": options.layers, "dtype": options.dtype, "device": options.device},
        "batch": {"queries": options.rows, "positives": 1, "length": options.length, "dropout": options.dropout},
        "num_steps": options.steps,
        "micro_batch_tokens": options.tokens,
        "points": points,
        "difference": cached["difference"],
        "verdict": OK if cached["difference"] <= _TOLERANCE else WRONG,
        "peak_bytes": cached["peak_bytes"],
        "time_ratio": cached["seconds"] / one_shot["seconds"],
        "cpu_time_ratio": cached["cpu_seconds"] / one_shot["cpu_seconds"],
    }


COLUMNS: Any = [
    ("", lambda row: row["mode"]),
    ("rows", lambda row: str(row["rows"])),
    ("rows at once", lambda row: str(row["micro_batch_rows"])),
    ("seconds", lambda row: f"{row['seconds']:.1f}"),
    ("CPU seconds", lambda row: f"{row['cpu_seconds']:.1f}"),
    ("texts/s", lambda row: f"{row['texts_per_second']:.2f}"),
    ("peak GB", lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/big_batch.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=256, help="contrastive batch: queries, each with one positive (default 256)")
    add("--length", type=int, default=64, metavar="N", help="prompt tokens of each text (default 64)")
    add("--steps", type=int, default=5, metavar="K", help="default 5")
    add("--tokens", type=int, default=2208, help="micro-batch: positions, K included (default 2208, 16 rows)")
    add("--dropout", type=float, default=0.1, help="of LoRA (default 0.1)")
    add("--sample", type=int, help="one-shot: so many micro-batches, scaled up (default all)")
    add("--layers", type=int, help="random weights and so many layers instead: a quick look, recorded as such")
    add("--dtype", default="float32", help="of the frozen base")
    add("--device", default="cpu")
    add("--out", type=Path, default=ROOT / "runs" / "bench" / "big-batch.json", help="the record as JSON")
    add("--worker", choices=(CACHED, ONE_SHOT), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("rows", "length", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    if options.layers is None and not options.worker:
        try:
            smollm2_path()
        except MissingWeights as error:
            parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
