#!/usr/bin/env python
"""`soft_embed` against eager PyTorch, `softmax(hidden @ W.T) @ E`, and `torch.compile` of that: time and peak extra
memory, forward and backward.

    python bench/soft_embed.py --out bench/results/soft_embed-cpu.json

Frozen matrices, random hidden states and upstream gradients. Times are medians of interleaved runs in one process; the
peak of each point is taken in a fresh process (not of the compiled form: its compiler would count). The floor is that
of the kernels' traffic model at ceilings measured in the same run. Nothing is printed unless values and gradients agree
with float64 first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.cases import BOTH, MODELS, PASSES, Case
from bench.floors import measure_ceilings
from bench.memory import peak, reset_peak
from bench.op_engines import Op, Problem, WrongResultError, check, compiled, draw_matrices, eager, ours
from bench.provenance import provenance
from bench.records import save, to_json
from bench.tables import table
from bench.timing import interleaved
from bench.verdict import first_line

OPS: dict[str, Op] = {"eager": eager, "ours": ours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=MODELS, default="qwen2.5-0.5b", help="model whose matrices are used")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="numbers of rows T")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each point")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    parser.add_argument("--peak-of", nargs=3, metavar=("OP", "PASS", "T"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        op, what, rows = options.peak_of
        print(measure_peak(options, op, what, int(rows)))
        return 0

    device, points, worst = torch.device(options.device), [], 0.0
    failures: dict[str, str] = {}
    head, embed = draw_matrices(MODELS[options.shape], getattr(torch, options.dtype), device)
    ceilings = measure_ceilings(device, head.dtype)
    for rows in options.rows:
        try:
            worst = max(worst, check(Problem.draw(rows, BOTH, head, embed))["worst_ratio"])
        except WrongResultError as error:
            raise SystemExit(f"bench/soft_embed.py: {error}") from error
        for what in PASSES:
            problem = Problem.draw(rows, what, head, embed)
            runs = {name: problem.call(op) for name, op in OPS.items()}
            for run in runs.values():
                run()
            if not options.no_compile:
                run = problem.call(compiled())
                try:
                    run()
                    runs["compiled"] = run
                except Exception as error:  # no C++ compiler, for one
                    failures[f"compiled, T = {rows}, {what}"] = first_line(error)
            timings = interleaved(runs, device, options.repeats)
            points.append(
                {
                    "rows": rows,
                    "pass": what,
                    "milliseconds": {name: timing.seconds * 1e3 for name, timing in timings.items()},
                    "spread": {name: timing.spread for name, timing in timings.items()},
                    "speedup": timings["eager"].seconds / timings["ours"].seconds,
                    "floor_milliseconds": Case(options.shape, rows, what, options.dtype).floor(ceilings) * 1e3,
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
        "ceilings": vars(ceilings),
        "failures": failures,
        "worst_error_over_eager": worst,
        "points": points,
        "provenance": provenance(device, "soft_embed"),
    }
    print(report(record))
    if options.out:
        save(record, options.out)
    print(to_json(record))
    return 0


def peak_of(name: str, what: str, rows: int) -> int | None:
    command = [sys.executable, *sys.argv, "--peak-of", name, what, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def measure_peak(options: argparse.Namespace, name: str, what: str, rows: int) -> int:
    """Bytes above what was in use before the call; results count as extra."""
    device = torch.device(options.device)
    head, embed = draw_matrices(MODELS[options.shape], getattr(torch, options.dtype), device)
    small = Problem.draw(1, what, head[:4096], None if embed is None else embed[:4096])
    small.call(OPS[name])()  # libraries, threads and their scratch are not the op's
    run = Problem.draw(rows, what, head, embed).call(OPS[name])
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
        ("compiled ms", lambda p: f"{p['milliseconds']['compiled']:.1f}" if "compiled" in p["milliseconds"] else "-"),
        ("ours ms", lambda p: f"{p['milliseconds']['ours']:.1f}"),
        ("floor ms", lambda p: f"{p['floor_milliseconds']:.1f}"),
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
