"""The scaling curves of docs/performance.md: predicted and measured slopes, and the figures."""

from __future__ import annotations

import re

from bench.blocks_performance import versions
from bench.documents import Record, Results, block
from bench.scaling_curves import CPU, CUDA, KINDS, Scale
from bench.scaling_plots import plot_scaling
from bench.scaling_tables import SLOPES, rows_of
from bench.tables import markdown

COMMAND = "python bench/scaling.py --out bench/results"


@block("scaling-cpu")
def scaling_cpu(results: Results) -> str:
    return _scaling(results, "cpu", CPU)


@block("scaling-gpu")
def scaling_gpu(results: Results) -> str:
    return _scaling(results, "cuda", CUDA)


def _scaling(results: Results, device: str, scale: Scale) -> str:
    order = {curve.name: number for number, curve in enumerate(scale.curves)}
    machines: dict[str, list[Record]] = {}
    for record in results.of("scaling"):
        if record["device"] == device and not record["quick"] and record["curve"] in order:
            machines.setdefault(record["provenance"]["device"], []).append(record)
    parts = []
    for machine, records in sorted(machines.items()):
        records.sort(key=lambda record: order[record["curve"]])
        parts += _machine(results, machine, records)
        absent = [name for name in order if name not in {record["curve"] for record in records}]
        if absent:
            parts.append(f"Not measured yet: {', '.join(absent)}: `{COMMAND}`")
    return "\n\n".join(parts) or f"not measured yet: `{COMMAND}{' --device cuda' if device == 'cuda' else ''}`"


def _machine(results: Results, machine: str, records: list[Record]) -> list[str]:
    rows = rows_of([{**record, "curve": record["curve"] + results.mark(record)} for record in records])
    good, slug = sum(row["ok"] for row in rows), re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    # on a CPU its name is among the versions
    where = versions(records) if records[0]["device"] == "cpu" else f"**{machine}**: {versions(records)}"
    parts = [
        f"{where}. {good} of {len(rows)} slopes as predicted.",
        markdown(SLOPES, rows),
        f"Memory: {records[0]['memory_counts']}.",
    ]
    for record in records:
        parts += [f"Left out of {record['curve']}: {one['size']} ({one['why']})." for one in record["left_out"]]
        if record.get("not_captured"):
            parts.append(f"NOT CAPTURED: {record['curve']} ran its step eagerly: {record['not_captured']}")
    for kind in KINDS:
        some = [record for record in records if record["curve"].startswith(f"{kind}.")]
        if some:
            parts.append(
                results.figure(f"scaling-{kind}-{slug}", f"scaling of {kind} on {machine}", some, plot_scaling)
            )
    return parts
