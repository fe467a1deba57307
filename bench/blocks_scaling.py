"""The scaling curves of docs/performance.md: predicted and measured slopes, and the figures."""

from __future__ import annotations

import re

from bench.blocks_performance import versions
from bench.documents import Record, Results, block
from bench.plots import Figure, Panel, Series
from bench.scaling_curves import CPU, CUDA, KINDS, Scale
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
    for record in results.of("scaling").values():
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
            parts.append(results.figure(f"scaling-{kind}-{slug}", f"scaling of {kind} on {machine}", _figure(some)))
    return parts


_AXES = {
    "T": "T, rows",
    "V": "V, vocabulary entries",
    "K": "K, generated soft tokens",
    "N": "N, prompt tokens of a text",
    "B": "B, texts",
}
# what, measured, predicted, the unit, its size in the record's
_PANELS = (
    ("time", "seconds", "floor_seconds", "milliseconds", 1e3),
    ("memory", "peak_extra_bytes", "predicted_bytes", "peak extra MiB", 2.0**-20),
)


def _figure(records: list[Record]) -> Figure:
    """A column for each curve, time above, peak memory below, predictions dotted."""
    panels = [_panel(record, *panel) for panel in _PANELS for record in records]
    first, origin = records[0], records[0]["provenance"]
    title = f"{first['curve'].partition('.')[0]}: {first['shape'] or 'the op alone'}, {first['dtype']}"
    caption = f"{origin['device']}, torch {origin['torch']}, {origin['date'][:10]}, commit {origin['commit']}"
    return Figure(panels=panels, title=title, caption=caption, columns=len(records), width=4.3 * len(records), height=7)


def _panel(record: Record, what: str, measured: str, predicted: str, unit: str, scale: float) -> Panel:
    series, verdicts = [], []
    for number, one in enumerate(record["series"]):
        name = f"{one['pass']}, " if len(record["series"]) > 1 else ""
        slopes = ["none" if one[what][key] is None else f"{one[what][key]:.2f}" for key in _SLOPES]
        verdicts.append(f"{name}slope {slopes[0]}, predicted {slopes[1]}{'' if one[what]['ok'] else '  NOT OK'}")
        eager = [point | {measured: point["eager"][measured]} for point in one["points"] if point.get("eager")]
        for label, points, key, color, style in (
            ("measured", one["points"], measured, 2 * number, "line"),
            ("predicted", one["points"], predicted, 2 * number, "dotted"),
            ("eager", eager, measured, 2 * number + 1, "line"),
        ):
            if points:
                x, y = [p["size"] for p in points], [p[key] * scale for p in points]
                series.append(Series(label=name + label, x=x, y=y, color=color, style=style))
    held = ", ".join(f"{name} = {size:,}" for name, size in record["held"].items())
    return Panel(
        series=series,
        title="\n".join([f"{what}  ({held})", *verdicts]),
        x_label="B, queries (3 B texts)" if record["curve"] == "train.B" else _AXES[record["axis"]],
        y_label=unit,
        x_scale="log2",
        y_scale="log",
        x_ticks=[point["size"] for point in record["series"][0]["points"]],
        least_range=8.0,
    )


_SLOPES = ("measured_slope", "predicted_slope")
