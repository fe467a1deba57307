#!/usr/bin/env python
"""What the compiler makes of every kernel of the config table, for GPUs that need not be there. Needs no GPU.

    python bench/compile_kernels.py                         # the record, bench/results/kernels-compile.json
    python bench/compile_kernels.py --variants plain --arch 90 --out report.json

Exits with code 1 if a plain variant spills, does not fit the shared memory or misses the tensor cores.
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


from bench.provenance import ROOT, provenance
from bench.records import save
from bench.static.compile_report import SHARED_LIMIT, is_good, report, table_cases

# What every call has in addition; see `bench.static.launches.Call`.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "scores": ("scores",),
    "noise": ("noise",),
    "threshold": ("threshold",),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add("--jobs", type=int, default=2, help="processes")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "kernels-compile.json")
    options = parser.parse_args()
    found: dict[str, Any] = {
        name: report(table_cases(*VARIANTS[name]), options.arch, options.jobs) for name in options.variants
    }
    save({"benchmark": "kernels-compile", **found, "provenance": provenance("cpu", "kernels-compile")}, options.out)
    for name, entries in found.items():
        bad = [entry for entry in entries if not is_good(entry)]
        print(f"{name}: {len(entries)} kernels compiled, {len(bad)} spill, do not fit or miss the tensor cores")
        for e in bad:
            print(
                f"  sm_{e['arch']} {e['dtype']} {e['kernel']} {e['blocks']} warps {e['num_warps']} stages "
                f"{e['num_stages']}: {e['registers']} registers, stack {e['stack']}, "
                f"shared {e['shared'] / 1024:.0f} of {e['shared_limit'] / 1024:.0f} KiB"
            )
    print(f"record: {options.out}")
    return 0 if all(map(is_good, found.get("plain", ()))) else 1


if __name__ == "__main__":
    sys.exit(main())
