"""The scaling curves of docs/performance.md: predicted and measured slopes, and a figure for each kind of curve."""

from __future__ import annotations

import re

from bench.blocks_performance import versions
from bench.documents import Record, Results, block
from bench.plots import Figure, Panel, Series
from bench.sweep import KINDS, NAMES, SLOPES, slope, slopes_of
from bench.tables import markdown

COMMAND = "python bench/run.py --sweep"
_AXES = {
    "T": "T, rows",
    "V": "V, vocabulary entries",
    "K": "K, generated soft tokens",
    "N": "N, prompt tokens of a text",
    "B": "B, texts (of training: queries, 3 B texts)",
}
# what -> measured, predicted, unit over the record's, label of the axis
_PANELS = {
    "time": ("seconds", "floor_seconds", 1e3, "milliseconds"),
    "memory": ("peak_extra_bytes", "predicted_bytes", 2.0**-20, "peak extra MiB"),
}


@block("scaling-cpu")
def scaling_cpu(results: Results) -> str:
    return _scaling(results, "cpu")


@block("scaling-gpu")
def scaling_gpu(results: Results) -> str:
    return _scaling(results, "cuda")


def _scaling(results: Results, device: str) -> str:
    machines: dict[str, list[Record]] = {}
    for record in results.of("scaling").values():
        if record["device"] == device and not record["quick"] and record["curve"] in NAMES:
            machines.setdefault(record["provenance"]["device"], []).append(record)
    parts = []
    for machine, records in sorted(machines.items()):
        records.sort(key=lambda record: NAMES.index(record["curve"]))
        parts += _machine(results, machine, records)
        absent = [name for name in NAMES if name not in {record["curve"] for record in records}]
        if absent:
            parts.append(f"Not measured yet: {', '.join(absent)}: `{COMMAND} {' '.join(absent)}`")
    return "\n\n".join(parts) or f"not measured yet: `{COMMAND}{' --device cuda' if device == 'cuda' else ''}`"


def _machine(results: Results, machine: str, records: list[Record]) -> list[str]:
    rows = slopes_of([{**record, "curve": record["curve"] + results.mark(record)} for record in records])
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


def _figure(records: list[Record]) -> Figure:
    """Curves of one kind: a column for each curve, time above, peak memory below, predictions dotted."""
    panels = [_panel(record, what) for what in _PANELS for record in records]
    first, origin = records[0], records[0]["provenance"]
    kind = {"soft_embed": "soft_embed", "encode": "Encoding", "train": "One training step"}
    title = f"{kind[first['curve'].partition('.')[0]]}: {first['shape'] or 'the op alone'}, {first['dtype']}"
    where = f"{origin['device']}, torch {origin['torch']}, {origin['date'][:10]}, commit {origin['commit'] or 'none'}"
    return Figure(panels=panels, title=title, caption=where, columns=len(records), width=4.3 * len(records), height=7)


def _panel(record: Record, what: str) -> Panel:
    measured, predicted, scale, unit = _PANELS[what]
    held = ", ".join(f"{name} = {size:,}" for name, size in record["held"].items())
    series, titles = [], [f"{what}  ({held})"]
    for number, one in enumerate(record["series"]):
        name, verdict = f"{one['pass']}, " if len(record["series"]) > 1 else "", one[what]
        slopes = f"slope {slope(verdict['measured_slope'])}, predicted {slope(verdict['predicted_slope'])}"
        titles.append(f"{name}{slopes}{'' if verdict['ok'] else '  NOT OK'}")
        eager = [{"size": point["size"], **point["eager"]} for point in one["points"] if point.get("eager")]
        for label, points, key, color, style in (
            ("measured", one["points"], measured, 2 * number, "line"),
            ("predicted", one["points"], predicted, 2 * number, "dotted"),
            ("eager", eager, measured, 2 * number + 1, "line"),
        ):
            x, y = [point["size"] for point in points], [point[key] * scale for point in points]
            series += [Series(label=name + label, x=x, y=y, color=color, style=style)] if x else []
    return Panel(
        series=series,
        title="\n".join(titles),
        x_label=_AXES[record["axis"]],
        y_label=unit,
        x_scale="log2",
        y_scale="log",
        x_ticks=[point["size"] for point in record["series"][0]["points"]],
        least_range=8.0,
    )
