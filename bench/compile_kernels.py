#!/usr/bin/env python
"""Record of what the compiler makes of every kernel config: bench/results/kernels-compile.json. Needs no GPU.

python bench/compile_kernels.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.provenance import ROOT, provenance
from bench.records import save
from bench.static import compile_report


def cases(**flags: bool) -> list[compile_report.Case]:
    """Those of the table; the options are `soft_embed`'s."""
    return [case for case in compile_report.table_cases(**flags) if not (flags and case.contrastive)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(compile_report.SHARED_LIMIT)
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kernels-compile.json")
    options = parser.parse_args()
    variants: dict[str, Any] = {
        name: compile_report.report(cases(**flags), options.arch, options.jobs)
        for name, flags in {
            "plain": {},
            "options": {"options": True},
            "noise": {"noise": True},
            "threshold": {"threshold": True},
        }.items()
    }
    save({"benchmark": "kernels-compile", **variants, "provenance": provenance(torch.device("cpu"))}, options.out)
    for name, entries in variants.items():
        bad = [entry for entry in entries if not compile_report.is_good(entry)]
        print(f"{name}: {len(entries)} kernels compiled, {len(bad)} spill or do not fit")
    print(f"record: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
