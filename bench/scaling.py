#!/usr/bin/env python
"""Scaling curves: time and peak memory against T, V, K, N and B, each with the slope that is predicted for it.

    python bench/scaling.py --out bench/results              # all curves: about ten minutes on two cores
    python bench/scaling.py --curves soft_embed,encode.K     # some of them
    python bench/scaling.py --quick                          # tiny sizes, half a minute: does it run?

Each finished curve is a file of its own in DIR/scaling-<device>/, written at once; the same command again goes on where
this one stopped, and measures again what was measured with other sources. No curve is kept whose numbers disagree with
the reference. A slope that is not as predicted is a finding: it is printed and recorded, and no error.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import scaling_encode, scaling_soft_embed, scaling_train
from bench.agreement import Disagreement
from bench.floors import measure_ceilings
from bench.memory import give_back
from bench.op_engines import WrongResultError
from bench.provenance import ROOT, device_name, provenance
from bench.records import save
from bench.scaling_curves import CPU, CUDA, ENCODE, QUICK, SOFT_EMBED, TRAIN, Curve, Scale
from bench.scaling_slopes import judge
from bench.scaling_tables import POINTS, SLOPES, rows_of
from bench.tables import table
from bench.verdict import first_line
from gircse.roofline import Ceilings

MEASURES: dict[str, Callable[[Curve, Scale, torch.device, Ceilings], dict[str, Any]]] = {
    SOFT_EMBED: scaling_soft_embed.measure,
    ENCODE: scaling_encode.measure,
    TRAIN: scaling_train.measure,
}
COUNTED = {
    "cuda": "what PyTorch's allocator had at most above what was there before the call, results included",
    "cpu": (
        "tensors at the peak above what was there before the call, results included, as PyTorch's profiler sees them; "
        "scratch inside libraries is not counted, buffers of keys and values are in full"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 a curve failed (numbers that disagree, an error), 2 bad options."""
    started = time.perf_counter()
    options, scale, curves = _parse(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device.type == "cuda" else "cpu"
    folder = options.out / f"scaling-{slug}{'-quick' if options.quick else ''}"
    origin = provenance(device)
    print(f"{origin['device']}, {origin['threads']} threads; torch {origin['torch']}; records: {folder}", flush=True)
    found = {curve.name: _finished(folder, curve, scale, origin) for curve in curves}
    ceilings: Ceilings | None = None
    problems: list[str] = []
    for number, curve in enumerate(curves, 1):
        if found[curve.name] is not None:
            print(f"{number}/{len(curves)} {curve.name}: is there already", flush=True)
            continue
        if ceilings is None:
            dtype = getattr(torch, scale.dtype)
            ceilings = measure_ceilings(device, dtype, seconds=0.05 if options.quick else 0.6)
            print(f"measured ceilings: {ceilings} ({scale.dtype})", flush=True)
        before = time.perf_counter()
        try:
            record = {**_record(curve, scale, device, ceilings), "provenance": provenance(device)}
        except Exception as error:  # one curve must not cost the others their turn on the machine
            wrong = isinstance(error, (Disagreement, WrongResultError))
            problems.append(f"{curve.name}: {error if wrong else first_line(error)}")
            ended = "PROBLEM, see below"
        else:
            found[curve.name] = record
            save(record, folder / f"{curve.name}.json")
            ended = f"{time.perf_counter() - before:.0f} s"
        print(f"{number}/{len(curves)} {curve.name}: {ended}", flush=True)
        gc.collect()
        give_back(device)
    _report([record for record in found.values() if record is not None], time.perf_counter() - started, problems)
    return 1 if problems else 0


def _record(curve: Curve, scale: Scale, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    measured = MEASURES[curve.kind](curve, scale, device, ceilings)
    series = [
        {**one, "time": judge("time", one["points"]), "memory": judge("memory", one["points"])}
        for one in measured.pop("series")
    ]
    return {
        "benchmark": "scaling",
        **_setting(curve, scale),
        "device": device.type,
        "memory_counts": COUNTED[device.type],
        "ceilings": vars(ceilings),
        **measured,
        "series": series,
    }


def _setting(curve: Curve, scale: Scale) -> dict[str, Any]:
    """What a record was measured with: the same, or it is measured again."""
    return {
        "curve": curve.name,
        "axis": curve.axis,
        "sizes": list(curve.sizes),
        "held": curve.held,
        "shape": None if curve.kind == SOFT_EMBED else scale.shape,
        "layers": scale.layers,
        "dtype": scale.dtype,
        "repeats": scale.repeats,
        "quick": scale is QUICK,
    }


def _finished(folder: Path, curve: Curve, scale: Scale, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The curve's record, if it was measured on this device with the present sources and sizes."""
    try:
        record = json.loads((folder / f"{curve.name}.json").read_text(encoding="utf-8"))
        same = all(record["provenance"][key] == origin[key] for key in ("device", "sources", "engine_sources"))
        same = same and all(record[key] == value for key, value in _setting(curve, scale).items())
        return record if same else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours
        return None


def _report(records: list[dict[str, Any]], seconds: float, problems: list[str]) -> None:
    for record in records:
        held = ", ".join(f"{name} = {value:,}" for name, value in record["held"].items())
        print(f"\n{record['curve']} ({held})")
        for one in record["series"]:
            print(table(POINTS, [{**point, "pass": one["pass"]} for point in one["points"]]))
        for one in record["left_out"]:
            print(f"left out: {one['size']:,}: {one['why']}")
    rows = rows_of(records)
    if rows:
        print("\n" + table(SLOPES, rows))
        good = sum(row["ok"] for row in rows)
        print(f"\n{good} of {len(rows)} slopes as predicted{'' if good == len(rows) else '; NOT OK: see above'}")
    for line in problems:
        print(f"PROBLEM: {line}")
    print(f"{seconds:.0f} s")


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Scale, list[Curve]]:
    parser = argparse.ArgumentParser(prog="bench/scaling.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="default: bench/results")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--curves", default="", metavar="NAMES", help="some of them: soft_embed.T,encode,.. (default: all)")
    add("--quick", action="store_true", help="tiny sizes, in a folder of their own, which no page shows")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = options.device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device: got {options.device!r}, expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got {options.device!r}, but PyTorch sees no GPU")
    scale = QUICK if options.quick else CUDA if kind == "cuda" else CPU
    wanted = [name for name in options.curves.split(",") if name]
    for name in wanted:
        if not any(name in (curve.name, curve.kind) for curve in scale.curves):
            known = ", ".join([*MEASURES, *(curve.name for curve in scale.curves)])
            parser.error(f"--curves: got {name!r}, expected some of {known}")
    curves = [curve for curve in scale.curves if not wanted or {curve.name, curve.kind} & set(wanted)]
    return options, scale, curves


if __name__ == "__main__":
    sys.exit(main())
