"""The scaling curves of docs/performance.md: predicted and measured slopes, and a figure for each kind of curve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.blocks_performance import versions
from bench.documents import Record, Results, block
from bench.plots import plain_log_ticks, pyplot, save_figure
from bench.sweep import KINDS, NAMES, SLOPES, TOLERANCES, slope, slopes_of
from bench.tables import markdown

COMMAND = "python bench/run.py --sweep"


@block("scaling-cpu")
def scaling_cpu(results: Results) -> str:
    return _scaling(results, "cpu")


@block("scaling-gpu")
def scaling_gpu(results: Results) -> str:
    return _scaling(results, "cuda")


def _scaling(results: Results, device: str) -> str:
    machines: dict[str, list[Record]] = {}
    for record in results.of("scaling"):
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
            parts.append(
                results.figure(f"scaling-{kind}-{slug}", f"scaling of {kind} on {machine}", some, plot_scaling)
            )
    return parts


# colours of Okabe and Ito, as in bench/plots.py: of a series, and of its eager baseline
_STYLES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s"}),
    ({"color": "#009E73", "marker": "^"}, {"color": "#E69F00", "marker": "v"}),
]
_AXES = {
    "T": "T, rows",
    "V": "V, vocabulary entries",
    "K": "K, generated soft tokens",
    "N": "N, prompt tokens of a text",
    "B": "B, texts (of training: queries, 3 B texts)",
}
_TITLES = {"soft_embed": "soft_embed", "encode": "Encoding", "train": "One training step"}
# measured, predicted, unit over the record's, label of the axis
_PANELS = {
    "time": ("seconds", "floor_seconds", 1e3, "milliseconds"),
    "memory": ("peak_extra_bytes", "predicted_bytes", 2.0**-20, "peak extra MiB"),
}
_LEAST_RANGE = 8.0  # of an axis: what is flat should look flat
_SMALL: dict[str, Any] = {"loc": "left", "fontsize": 8.5, "color": "#444444"}


def plot_scaling(records: list[Record], path: Path) -> None:
    """Curves of one kind: a column for each curve, time above, peak memory below, predictions dotted."""
    plt = pyplot()
    figure, panels = plt.subplots(
        2, len(records), figsize=(4.3 * len(records), 7.0), layout="constrained", squeeze=False, sharex="col"
    )
    for column, record in enumerate(records):
        for row, what in enumerate(TOLERANCES):
            _panel(panels[row][column], record, what)
            if column == 0:
                panels[row][0].set_ylabel(_PANELS[what][-1])
        held = ", ".join(f"{name} = {value:,}" for name, value in record["held"].items())
        panels[0][column].set_title(f"against {record['axis']}  ({held})\n{_said(record, 'time')}", **_SMALL)
        panels[1][column].set_title(_said(record, "memory"), **_SMALL)
        panels[1][column].set_xlabel(_AXES[record["axis"]])
    panels[0][0].legend(loc="best", frameon=False, fontsize=8)
    first, origin = records[0], records[0]["provenance"]
    model = "" if first["shape"] is None else f"{first['shape']}, "
    where = f"{origin['device']}, torch {origin['torch']}, {origin['date'][:10]}, commit {origin['commit'] or 'none'}"
    title = f"{_TITLES[first['curve'].partition('.')[0]]}: {model}{first['dtype']}"
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(where, fontsize=7.5, color="#777777", x=0.01, ha="left")
    save_figure(plt, figure, path)


def _panel(axes: Any, record: Record, what: str) -> None:
    measured, predicted, scale, _ = _PANELS[what]
    several = len(record["series"]) > 1
    for one, (style, other) in zip(record["series"], _STYLES, strict=False):
        points = one["points"]
        sizes = [point["size"] for point in points]
        label, dotted = (
            (one["pass"], f"{one['pass']}, predicted") if several else ("measured", "predicted (time: the floor)")
        )
        axes.plot(sizes, [point[measured] * scale for point in points], label=label, linewidth=2, markersize=5, **style)
        prediction = [point[predicted] * scale for point in points]
        axes.plot(sizes, prediction, ":", label=dotted, color=style["color"], linewidth=1.6)
        eager = [(point["size"], point["eager"][measured] * scale) for point in points if point.get("eager")]
        if eager:
            axes.plot(*zip(*eager, strict=True), label=f"{label}, eager", linewidth=1, markersize=3.5, **other)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [point["size"] for point in record["series"][0]["points"]]
    labels = [f"{tick // 1024}k" if tick >= 4096 and tick % 1024 == 0 else str(tick) for tick in ticks]
    axes.set_xticks(ticks, labels, fontsize=8.5)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < _LEAST_RANGE * low:
        middle, half = (low * high) ** 0.5, _LEAST_RANGE**0.5
        axes.set_ylim(middle / half, middle * half)
    plain_log_ticks(axes)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _said(record: Record, what: str) -> str:
    """A line for each pass: measured slope, predicted slope, and whether they disagree."""
    lines = []
    for one in record["series"]:
        found = one[what]
        name = f", {one['pass']}" if len(record["series"]) > 1 else ""
        wrong = "" if found["ok"] else "  NOT OK"
        slopes = f"slope {slope(found['measured_slope'])}, predicted {slope(found['predicted_slope'])}"
        lines.append(f"{what}{name}: {slopes}{wrong}")
    return "\n".join(lines)
