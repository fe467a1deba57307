#!/usr/bin/env python
"""`soft_embed` against eager PyTorch, `softmax(hidden @ W.T) @ E`, and `torch.compile` of that: time and peak extra
memory, forward and backward, over the number of rows.

    python bench/soft_embed.py --out bench/results/soft_embed-cpu.json

The matrices are frozen, hidden states and upstream gradients are random. Each point is measured as a case of the GPU
suite is (`bench/op_measure.py`): the engines take turns, and the results are held against float64. Nothing is recorded
where they are wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.cases import MODELS, PASSES, Case
from bench.floors import measure_ceilings
from bench.op_engines import draw_matrices
from bench.op_measure import measure
from bench.provenance import provenance
from bench.records import save, to_json
from bench.tables import column, table
from bench.verdict import is_good

_MIB = 2**-20
_COLUMNS = [
    column("pass", "pass"),
    column("T", "rows"),
    *(column(f"{name} ms", f"milliseconds.{name}", "{:,.1f}") for name in ("eager", "compiled", "ours")),
    column("floor ms", "floor_milliseconds", "{:,.1f}"),
    column("x eager", "speedup", "{:.2f}x"),
    *(column(f"{name} MiB", f"peak_extra_bytes.{name}", "{:,.0f}", _MIB) for name in ("eager", "ours")),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=MODELS, default="qwen2.5-0.5b", help="model whose matrices are used")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="numbers of rows T")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the timed runs of each point (default 10)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    options = parser.parse_args(argv)
    device, origin = torch.device(options.device), provenance(options.device, "soft_embed")
    head, embed = draw_matrices(MODELS[options.shape], getattr(torch, options.dtype), device)
    ceilings, points, worst = measure_ceilings(device, head.dtype), [], 0.0
    failures: dict[str, str] = {}
    backend = None if options.no_compile else "inductor"
    for case in (Case(options.shape, rows, what, options.dtype) for rows in options.rows for what in PASSES):
        measured = measure(case, head, embed, ceilings, compile_backend=backend, budget=options.seconds)
        if not is_good(measured):
            raise SystemExit(f"bench/soft_embed.py: {case.name}: {measured['agreement']['why']}")
        worst = max(worst, measured["agreement"]["worst_ratio"])
        failures |= {f"{name}, T = {case.rows}, {case.what}": why for name, why in measured["failures"].items()}
        points.append(_point(measured))
    record = {
        "benchmark": "soft_embed",
        "shape": options.shape,
        "vocab": head.shape[0],
        "hidden": head.shape[1],
        "tied": embed is None,
        "dtype": options.dtype,
        "ceilings": vars(ceilings),
        "failures": failures,
        "worst_error_over_eager": worst,
        "points": points,
        "provenance": origin,
    }
    print(f"soft_embed, {options.shape} ({MODELS[options.shape]}), {options.dtype}")
    print(f"{origin['device']}, {origin['threads']} threads, torch {origin['torch']}, sources {origin['sources']}")
    print(f"worst error over eager's, against float64: {worst:.2f}\n\n{table(_COLUMNS, points)}\n")
    print("medians of interleaved runs; MiB: what is allocated at the peak beyond the inputs, the result included")
    if options.out:
        save(record, options.out)
    print(to_json(record))
    return 0


def _point(measured: dict[str, Any]) -> dict[str, Any]:
    """What this record keeps of a measured case."""
    engines = {name: engine for name, engine in measured["engines"].items() if engine is not None}
    return {
        **{key: measured[key] for key in ("rows", "pass", "repeats", "floor_milliseconds")},
        "speedup": measured["plain_speedup"],  # of plain calls, as all times here are
        **{key: {name: engines[name][key] for name in engines} for key in ("milliseconds", "spread")},
        "peak_extra_bytes": {name: engine["peak_extra_bytes"] for name, engine in engines.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
