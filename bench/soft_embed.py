#!/usr/bin/env python
"""`soft_embed` against eager PyTorch, `softmax(hidden @ W.T) @ E`: time and peak extra memory, forward and backward.

    python bench/soft_embed.py --out bench/results/soft_embed-cpu.json

Frozen matrices, random hidden states and upstream gradients. Times are medians of interleaved runs in one process; the
peak of each point is taken in a fresh process. Nothing is printed unless values and gradients agree with float64 first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.provenance import provenance
from bench.records import save, to_json
from bench.shapes import SHAPES
from bench.tables import table
from bench.timing import Timing, seconds
from bench.train_worker import peak, reset_peak
from gircse.ops import soft_embed
from gircse.ops.reference import soft_embed_reference

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def eager(hidden: Tensor, head: Tensor, embed: Tensor | None) -> Tensor:
    return torch.softmax(hidden @ head.T, dim=-1) @ (head if embed is None else embed)


OPS: dict[str, Op] = {"eager": eager, "ours": lambda hidden, head, embed: soft_embed(hidden, head, embed)}
PASSES = ("forward", "forward+backward")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b", help="model whose matrices are used")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="numbers of rows T")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each point")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    parser.add_argument("--peak-of", nargs=3, metavar=("OP", "PASS", "T"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        op, what, rows = options.peak_of
        print(measure_peak(options, op, what, int(rows)))
        return 0

    device, points = torch.device(options.device), []
    head, embed = matrices(options)
    worst = 0.0
    for rows in options.rows:
        worst = max(worst, check(rows, head, embed))
        for what in PASSES:
            runs = {name: call(name, what, rows, head, embed) for name in OPS}
            for run in runs.values():
                run()
            times: dict[str, list[float]] = {name: [] for name in OPS}
            for _ in range(options.repeats):
                for name, run in runs.items():
                    times[name].append(seconds(run, device))
            median = {name: Timing.of(values).seconds for name, values in times.items()}
            points.append(
                {
                    "rows": rows,
                    "pass": what,
                    "milliseconds": {name: value * 1e3 for name, value in median.items()},
                    "spread": {name: Timing.of(values).spread for name, values in times.items()},
                    "speedup": median["eager"] / median["ours"],
                    "peak_extra_bytes": {name: peak_of(name, what, rows) for name in OPS},
                }
            )
    record = {
        "benchmark": "soft_embed",
        "shape": options.shape,
        "vocab": head.shape[0],
        "hidden": head.shape[1],
        "tied": embed is None,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "worst_error_over_eager": worst,
        "points": points,
        "provenance": provenance(device),
    }
    print(report(record))
    if options.out:
        save(record, options.out)
    print(to_json(record))
    return 0


def matrices(options: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """The head [V, D], and the embedding [V, D] or None where the model ties them."""
    settings = SHAPES[options.shape].settings
    shape, dtype = (settings["vocab_size"], settings["hidden_size"]), getattr(torch, options.dtype)
    generator = torch.Generator(options.device).manual_seed(0)
    head = torch.randn(shape, generator=generator, device=options.device).mul_(shape[1] ** -0.5).to(dtype)
    if settings["tie_word_embeddings"]:
        return head, None
    return head, torch.randn(shape, generator=generator, device=options.device).to(dtype)


def call(name: str, what: str, rows: int, head: Tensor, embed: Tensor | None) -> Callable[[], Any]:
    hidden = inputs(rows, head).requires_grad_(what != "forward")
    upstream = torch.randn(rows, head.shape[1], device=head.device, dtype=head.dtype)
    op = OPS[name]
    if what == "forward":
        return lambda: op(hidden, head, embed)
    return lambda: torch.autograd.grad(op(hidden, head, embed), hidden, upstream)


def inputs(rows: int, head: Tensor) -> Tensor:
    """Hidden states whose logits have a standard deviation of 3: entropies of soft tokens as models have them."""
    generator = torch.Generator(head.device).manual_seed(1)
    return (3 * torch.randn(rows, head.shape[1], generator=generator, device=head.device)).to(head.dtype)


def check(rows: int, head: Tensor, embed: Tensor | None, *, sample: int = 4) -> float:
    """Worst ratio of our error to eager's, both against float64, of values and gradients; refuses above 2."""
    hidden = inputs(min(rows, sample), head)
    upstream = torch.randn(hidden.shape[0], head.shape[1], device=head.device).to(head.dtype)
    exact_in = hidden.double().requires_grad_()
    wide = [None if matrix is None else matrix.double() for matrix in (head, embed)]
    exact, _ = soft_embed_reference(exact_in, *wide)
    (exact_gradient,) = torch.autograd.grad(exact, exact_in, upstream.double())
    errors = {}
    for name, op in OPS.items():
        leaf = hidden.clone().requires_grad_()
        out = op(leaf, head, embed)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        errors[name] = [
            ((got.double() - want).norm() / want.norm()).item()
            for got, want in ((out.detach(), exact.detach()), (gradient, exact_gradient))
        ]
    ratio = max(ours / max(theirs, 1e-9) for ours, theirs in zip(errors["ours"], errors["eager"], strict=True))
    if not (ratio <= 2 or max(errors["ours"]) < 1e-6):
        raise SystemExit(f"no speed is printed: our error is {ratio:.1f} times eager's at T = {rows}: {errors}")
    return ratio


def peak_of(name: str, what: str, rows: int) -> int | None:
    command = [sys.executable, *sys.argv, "--peak-of", name, what, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def measure_peak(options: argparse.Namespace, name: str, what: str, rows: int) -> int:
    """Bytes above what was in use before the call; results count as extra."""
    head, embed = matrices(options)
    device = torch.device(options.device)
    small = call(name, what, 1, head[:4096], None if embed is None else embed[:4096])
    small()  # libraries, threads and their scratch are not the op's
    run = call(name, what, rows, head, embed)
    before = reset_peak(device)
    run()
    return peak(device) - before


def mebibytes(peak_bytes: int | None) -> str:
    """A dash where the measuring process failed: that is not zero."""
    return "-" if peak_bytes is None else f"{peak_bytes / 2**20:.0f}"


def report(record: dict[str, Any]) -> str:
    columns = [
        ("pass", lambda p: p["pass"]),
        ("T", lambda p: str(p["rows"])),
        ("eager ms", lambda p: f"{p['milliseconds']['eager']:.1f}"),
        ("ours ms", lambda p: f"{p['milliseconds']['ours']:.1f}"),
        ("spread", lambda p: f"{max(p['spread'].values()):.0%}"),
        ("speed-up", lambda p: f"{p['speedup']:.2f}x"),
        ("eager MiB", lambda p: mebibytes(p["peak_extra_bytes"]["eager"])),
        ("ours MiB", lambda p: mebibytes(p["peak_extra_bytes"]["ours"])),
    ]
    tied = "tied" if record["tied"] else "untied"
    origin = record["provenance"]
    return "\n".join(
        [
            f"soft_embed, {record['shape']} ({record['vocab']} x {record['hidden']}, {tied}), {record['dtype']}",
            f"{origin['device']}, {origin['threads']} threads, torch {origin['torch']}, sources {origin['sources']}",
            f"worst error over eager's, against float64: {record['worst_error_over_eager']:.2f}",
            "",
            table(columns, record["points"]),
            "",
            f"medians of {record['repeats']} interleaved runs; MiB: peak above inputs and libraries, result included",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
