"""`bench/run.py --sweep`: time and peak memory against one size at a time, each beside what is predicted for it.

A curve varies T rows or V vocabulary entries of `soft_embed`, or K steps, N prompt tokens or B rows of encoding and of
a training step (there B queries with a positive and a negative each, so 3 B texts). Its prediction is a curve as well:
the floor of the job (seconds) and a count of what must be held at once (bytes). Both get one number, the slope of a
straight line through (log size, log value) by least squares. A constant factor between them, such as the distance of an
implementation from its floor, does not change the slope, but a factor that grows with the size does. A slope of 1 is
proportional to the size, and a slope of 0 does not depend on it.

Each finished curve is written to a file of its own. A curve whose results disagree with the reference is not written.
A slope that is not as predicted is a finding: it is printed and recorded, and no error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from bench.agreement import OK, reason, worst
from bench.floors import measure_ceilings
from bench.memory import COUNTED, give_back
from bench.provenance import provenance
from bench.records import UNSTEADY, save
from bench.sweep_jobs import Encode, Job, Sizes, SoftEmbed, Train
from bench.tables import Column, table
from bench.timing import interleaved
from gircse.engine.free_memory import free_bytes
from gircse.roofline import Ceilings
from gircse.train.plan.predict import USABLE

SOFT_EMBED, ENCODE, TRAIN = KINDS = ("soft_embed", "encode", "train")


@dataclass(frozen=True)
class Curve:
    """One size varies.

    Attributes:
        name: kind and the size that varies, such as "encode.K"; also the name of its record's file.
        sizes: the values of that size, rising.
        held: the other sizes.
    """

    name: str
    sizes: tuple[int, ...]
    held: Sizes

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def axis(self) -> str:
        return self.name.partition(".")[2]

    def at(self, size: int) -> Sizes:
        """All sizes of a point."""
        return {**self.held, self.axis: size}


CURVES: dict[str, list[Curve]] = {
    "cpu": [
        Curve("soft_embed.T", (1, 4, 16, 64, 256, 512), {"V": 49_152, "D": 576}),
        Curve("soft_embed.V", (4096, 8192, 16_384, 32_768, 65_536, 131_072), {"T": 64, "D": 576}),
        Curve("encode.K", (1, 2, 5, 10, 20), {"B": 16, "N": 32}),
        Curve("encode.N", (16, 32, 64, 128, 256), {"B": 16, "K": 5}),
        Curve("encode.B", (1, 2, 4, 8, 16, 32), {"N": 32, "K": 5}),
        Curve("train.K", (1, 2, 4, 8, 16), {"B": 4, "N": 32}),
        Curve("train.N", (16, 32, 64, 128, 256), {"B": 2, "K": 5}),
        Curve("train.B", (1, 2, 4, 8, 16), {"N": 32, "K": 5}),
    ],
    "cuda": [
        Curve("soft_embed.T", (1, 4, 16, 64, 256, 1024, 4096), {"V": 151_936, "D": 896}),
        Curve("soft_embed.V", (8192, 16_384, 32_768, 65_536, 131_072, 262_144), {"T": 256, "D": 896}),
        Curve("encode.K", (1, 2, 5, 10, 20, 40), {"B": 64, "N": 64}),
        Curve("encode.N", (64, 128, 256, 512, 1024, 2048), {"B": 64, "K": 5}),
        Curve("encode.B", (1, 4, 16, 64, 256, 1024), {"N": 64, "K": 5}),
        Curve("train.K", (1, 2, 5, 10, 20, 40), {"B": 8, "N": 128}),
        Curve("train.N", (64, 128, 256, 512, 1024, 2048), {"B": 2, "K": 5}),
        Curve("train.B", (4, 8, 16, 32, 64, 128, 256), {"N": 32, "K": 5}),
    ],
}
NAMES = [curve.name for curve in CURVES["cpu"]]
_QUICK = {"T": 4, "V": 1003, "D": 48, "K": 2, "N": 8, "B": 2}


def curves_of(device: str, quick: bool) -> list[Curve]:
    """The curves of a device; `quick`: the same code on sizes that take no time and mean nothing."""
    kind = torch.device(device).type
    if not quick:
        return CURVES[kind]
    return [
        Curve(c.name, tuple(s * _QUICK[c.axis] for s in (1, 2, 4)), {name: _QUICK[name] for name in c.held})
        for c in CURVES[kind]
    ]


def main(options: argparse.Namespace, config: PretrainedConfig) -> int:
    """Measures the curves that `options.sweep` names (all of them where it is empty). -> exit code: 0, or 1 where a
    curve failed or its results disagree with the reference."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    wanted = options.sweep or KINDS
    curves = [c for c in curves_of(options.device, options.quick) if {c.name, c.kind} & set(wanted)]
    ceilings = measure_ceilings(device, dtype)
    print(f"measured ceilings: {ceilings} ({options.dtype}); records: {options.out}", flush=True)
    records, problems = [], []
    for curve in curves:
        started = time.perf_counter()
        try:
            record = _record(curve, options, config, ceilings)
        except Exception as error:  # one curve must not cost the others their turn on the machine
            problems.append(f"{curve.name}: {reason(error)}")
            print(f"{curve.name}: PROBLEM, see below", flush=True)
        else:
            records.append(record)
            save(record, options.out / f"{curve.name}.json")
            print(f"{curve.name}: {time.perf_counter() - started:.0f} s", flush=True)
        give_back(device)
    print(_report(records))
    for line in problems:
        print(f"PROBLEM: {line}")
    return 1 if problems else 0


def _record(curve: Curve, options: argparse.Namespace, config: PretrainedConfig, ceilings: Ceilings) -> dict[str, Any]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if curve.kind == SOFT_EMBED:
        job: Job = SoftEmbed(curve.at(max(curve.sizes)), dtype, device, USABLE * free_bytes(device))
    else:
        job = (Encode if curve.kind == ENCODE else Train)(config, dtype, device)
    return {
        "benchmark": "scaling",
        "curve": curve.name,
        "axis": curve.axis,
        "sizes": list(curve.sizes),
        "held": curve.held,
        "shape": None if curve.kind == SOFT_EMBED else options.name,
        "layers": options.layers,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "quick": options.quick,
        "device": device.type,
        "memory_counts": COUNTED[device.type],
        "ceilings": vars(ceilings),
        **measure(curve, job, ceilings, device, options.repeats),
        "provenance": provenance(device, "scaling"),
    }


class DisagreementError(RuntimeError):
    """The results of a job are not those of the reference, so its speed means nothing."""


def measure(curve: Curve, job: Job, ceilings: Ceilings, device: torch.device, repeats: int) -> dict[str, Any]:
    """The series of a curve with the verdicts on their slopes, and the sizes that this machine's memory does not hold.

    Raises:
        DisagreementError, WrongResultError: before any clock has been read.
    """
    room = USABLE * free_bytes(device)
    held = {size: {what: job.held(what, curve.at(size)) for what in job.passes} for size in curve.sizes}
    sizes = [size for size in curve.sizes if max(held[size].values()) <= room]
    checks = job.check([curve.at(size) for size in sizes])
    bad = [check for check in checks if check.verdict != OK]
    if bad:
        raise DisagreementError("; ".join(check.describe("the reference") for check in bad[:3]))
    series = []
    for what in job.passes:
        runs, peaks = {}, {}
        for size in reversed(sizes):  # the largest first: the buffers that an engine keeps serve all others
            for name, run in job.runs(what, curve.at(size)).items():
                run()
                peaks[name, size] = job.peak(run, curve.at(size))
                runs[f"{name} {size}"] = run
                give_back(device)
        timings = interleaved(runs, device, repeats)
        points = [
            {
                "size": size,
                **timings[f"ours {size}"]._asdict(),
                "floor_seconds": ceilings.seconds(job.floor(what, curve.at(size))),
                "peak_extra_bytes": peaks["ours", size],
                "predicted_bytes": held[size][what],
                "eager": {"seconds": timings[f"eager {size}"].seconds, "peak_extra_bytes": peaks["eager", size]}
                if ("eager", size) in peaks
                else None,
            }
            for size in sizes
        ]
        series.append({"pass": what, "points": points, **{kind: judge(kind, points) for kind in TOLERANCES}})
    left_out = [
        {"size": s, "why": f"needs about {max(held[s].values()) / 2**30:.1f} of {room / 2**30:.1f} usable GiB"}
        for s in curve.sizes
        if s not in sizes
    ]
    return {
        "series": series,
        "left_out": left_out,
        "not_captured": job.not_captured(),
        "agreement": {"worst": worst(checks), "checks": len(checks)},
    }


# How far the measured slope may be from the predicted one. Over a range of 16 times the size, 0.15 is a factor of 1.5
# between the ends. Bytes are counted and not timed, so their tolerance is smaller.
TOLERANCES = {"time": 0.15, "memory": 0.10}
_KEYS = {"time": ("floor_seconds", "seconds"), "memory": ("predicted_bytes", "peak_extra_bytes")}


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """d log(value) / d log(size) by least squares; None where a value is not positive or there is only one size."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def judge(kind: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on the "time" or the "memory" of a series.

    Returns:
        predicted_slope, measured_slope, tolerance; ok: whether they are within it (without a slope they are not);
        over_prediction: the least and the largest measured value over the predicted one.
    """
    predicted, measured = ([point[key] for point in points] for key in _KEYS[kind])
    sizes = [point["size"] for point in points]
    slopes = log_slope(sizes, predicted), log_slope(sizes, measured)
    ratios = [m / p for m, p in zip(measured, predicted, strict=True)] if min(predicted, default=0) > 0 else []
    return {
        "predicted_slope": slopes[0],
        "measured_slope": slopes[1],
        "tolerance": TOLERANCES[kind],
        "ok": slopes[0] is not None and slopes[1] is not None and abs(slopes[0] - slopes[1]) <= TOLERANCES[kind],
        "over_prediction": [min(ratios), max(ratios)] if ratios else None,
    }


def slopes_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table `SLOPES`: one for the time and one for the memory of each series."""
    rows = []
    for record in records:
        for one in record["series"]:
            label = record["curve"] + (f", {one['pass']}" if len(record["series"]) > 1 else "")
            sizes = [point["size"] for point in one["points"]]
            span = f"{min(sizes):,} to {max(sizes):,}" if sizes else "none"
            spread = max((point["spread"] for point in one["points"]), default=0.0)
            for kind in TOLERANCES:
                unsteady = kind == "time" and spread > UNSTEADY
                rows.append({"label": label, "kind": kind, "sizes": span, "unsteady": unsteady, **one[kind]})
    return rows


def slope(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def _over_prediction(row: dict[str, Any]) -> str:
    """The range of the ratio, or one number where both ends are the same."""
    return " to ".join(dict.fromkeys(f"{end:.2f}" for end in row["over_prediction"] or ())) or "-"


SLOPES: list[Column] = [
    ("curve", lambda row: row["label"]),
    ("of", lambda row: row["kind"]),
    ("sizes", lambda row: row["sizes"]),
    ("predicted slope", lambda row: slope(row["predicted_slope"])),
    ("measured slope", lambda row: slope(row["measured_slope"])),
    ("tolerance", lambda row: f"{row['tolerance']:.2f}"),
    ("verdict", lambda row: ("ok" if row["ok"] else "NOT OK") + (", unsteady" if row["unsteady"] else "")),
    ("measured / predicted", _over_prediction),
]


def _report(records: Sequence[dict[str, Any]]) -> str:
    rows = slopes_of(records)
    good = sum(row["ok"] for row in rows)
    left_out = [f"left out of {r['curve']}: {one['size']:,}: {one['why']}" for r in records for one in r["left_out"]]
    return "\n".join([table(SLOPES, rows), *left_out, f"{good} of {len(rows)} slopes as predicted"])
