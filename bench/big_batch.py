#!/usr/bin/env python
"""A contrastive batch larger than the memory: gradient caching against one-shot micro-batches of the same total.

    python bench/big_batch.py --out bench/results/big-batch-cpu.json

Each of the two runs in a process of its own, so that the peak of its resident memory is its own: the whole batch by
gradient caching, and the same texts in micro-batches that are contrastive batches of their own (these cost less and
train less, because a query sees few negatives). It is the training code itself that runs, with dropout. Before that the
cached gradient of a small batch is compared with its one-shot gradient; where they differ, the figures are marked WRONG
(exit code 1). The last line is the record as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
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
from bench.provenance import ROOT, provenance
from bench.records import save, to_json
from bench.shapes import SHAPES, random_model
from bench.tables import Column, table
from bench.timing import seconds
from gircse.demo.smollm2 import MissingWeights, smollm2_path
from gircse.lm.load import load_tokenizer
from gircse.model import GIRCSE
from gircse.train.config import TrainConfig
from gircse.train.lora import trainable_model
from gircse.train.step import TokenizedRows, contrastive_backward

CACHED, ONE_SHOT = "gradient-caching", "one-shot"
_TOLERANCE = TOLERANCES[torch.float32].gradient
COLUMNS: list[Column] = [
    ("", lambda row: row["mode"]),
    ("rows", lambda row: str(row["rows"])),
    ("rows at once", lambda row: str(row["micro_batch_rows"])),
    ("seconds", lambda row: f"{row['seconds']:.1f}"),
    ("CPU seconds", lambda row: f"{row['cpu_seconds']:.1f}"),
    ("texts/s", lambda row: f"{row['texts_per_second']:.2f}"),
    ("peak GB", lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 the gradients differ or a process ended early, 2 bad options."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    if options.mode:
        print(json.dumps(_measure(options)), flush=True)
        return 0
    points = []
    for mode in (CACHED, ONE_SHOT):
        command = [sys.executable, __file__, *arguments, "--mode", mode]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            print(f"bench/big_batch.py: {mode} ended with exit code {done.returncode}", file=sys.stderr)
            return 1
        points.append(json.loads(done.stdout.splitlines()[-1]))
    cached, one_shot = points
    record = {
        "benchmark": "big-batch",
        "provenance": provenance(options.device, "big-batch"),
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
    print(table(COLUMNS, points))
    print(
        f"\ngradient caching over one-shot: time {record['time_ratio']:.3f}, CPU time (which other processes disturb "
        f"less) {record['cpu_time_ratio']:.3f}; gradients differ by {record['difference']:.1e}"
    )
    if record["verdict"] != OK:
        print(f"{WRONG}: the cached gradient differs by more than {_TOLERANCE:.0e}")
    save(record, options.out)
    print(f"record: {options.out}")
    print(to_json(record), flush=True)
    return 0 if record["verdict"] == OK else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """One mode, in this process."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    settings = TrainConfig(
        num_steps=options.steps, batch_size=options.rows, lora_dropout=options.dropout, device=options.device
    )
    model = _model(options, settings)
    difference = _check(model, options, settings) if options.mode == CACHED else None
    each = max(1, options.tokens // (options.length + options.steps) // 2)  # rows of a micro-batch: two texts each

    def step(start: int, stop: int, settings: TrainConfig) -> None:
        contrastive_backward(model, _batch(options, range(start, stop), model), settings, num_steps=options.steps)

    step(0, min(each, options.rows), settings)  # warm-up
    model.zero_grad(set_to_none=True)
    steps, share = [(0, options.rows, replace(settings, micro_batch_tokens=options.tokens))], 1.0
    if options.mode == ONE_SHOT:
        every = [(start, min(start + each, options.rows), settings) for start in range(0, options.rows, each)]
        steps = every[: options.sample]
        share = len(steps) / len(every)
    cpu = time.process_time()
    took = seconds(lambda: [step(*one) for one in steps], device)
    return {
        "mode": options.mode,
        "rows": options.rows,
        "micro_batch_rows": each,
        "seconds": took / share,
        "cpu_seconds": (time.process_time() - cpu) / share,
        "measured_share": share,
        "texts_per_second": 2 * options.rows * share / took,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak(),
        "difference": difference,
    }


def _resident_peak() -> int:
    """The largest resident size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _model(options: argparse.Namespace, settings: TrainConfig) -> GIRCSE:
    folder = smollm2_path()
    if options.layers is None:
        return trainable_model(replace(settings, model=str(folder), dtype=options.dtype)).train()
    config = SHAPES["smollm2-135m"].config(options.layers)
    base = random_model(config, dtype=getattr(torch, options.dtype), device=options.device)
    return trainable_model(settings, GIRCSE(base, load_tokenizer(folder))).train()


def _batch(options: argparse.Namespace, rows: range, model: GIRCSE) -> TokenizedRows:
    """One query and one positive a row, `length` random tokens each."""
    vocab = model.causal_lm.embed_weight.shape[0]

    def text(number: int) -> list[int]:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(vocab, (options.length,), generator=generator).tolist()

    return TokenizedRows(
        [text(2 * row) for row in rows], [text(2 * row + 1) for row in rows], torch.arange(len(rows)), mask=None
    )


def _check(model: GIRCSE, options: argparse.Namespace, settings: TrainConfig) -> float:
    """Relative difference of the LoRA gradients of four rows: cached in passes of three texts, and in one piece.

    A model in half precision is copied to float32: its own rounding says nothing about the division of the batch.
    """
    batch, found = _batch(options, range(4), model), []
    exact = copy.deepcopy(model).to(torch.float32) if model.causal_lm.head_weight.dtype in HALF else model
    exact.eval()  # no dropout: another division of the batch draws other masks
    for budget in (None, 3 * (options.length + options.steps)):
        contrastive_backward(exact, batch, replace(settings, micro_batch_tokens=budget), num_steps=options.steps)
        found.append(torch.cat([p.grad.reshape(-1) for p in exact.parameters() if p.grad is not None]))
        exact.zero_grad(set_to_none=True)
    model.train()
    return relative_error(found[1], found[0])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
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
    add("--mode", choices=(CACHED, ONE_SHOT), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("rows", "length", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    try:
        smollm2_path()
    except MissingWeights as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
