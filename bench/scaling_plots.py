"""Scaling curves as figures: a column for each curve, time above, peak memory below, predictions dotted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.plots import plain_log_ticks, pyplot, save_figure

_SERIES = (  # Okabe and Ito, as in bench/plots.py
    {"color": "#0072B2", "marker": "o"},
    {"color": "#009E73", "marker": "^"},
)
_EAGER = ({"color": "#D55E00", "marker": "s"}, {"color": "#E69F00", "marker": "v"})
_GREY = "#777777"
_AXES = {
    "T": "T, rows",
    "V": "V, vocabulary entries",
    "K": "K, generated soft tokens",
    "N": "N, prompt tokens of a text",
    "B": "B, texts",
}
_TITLES = {"soft_embed": "soft_embed", "encode": "Encoding", "train": "One training step"}
# what, measured, predicted, its unit over the record's
_PANELS = (("time", "seconds", "floor_seconds", 1e3), ("memory", "peak_extra_bytes", "predicted_bytes", 2.0**-20))
_LEAST_RANGE = 8.0  # of an axis: what is flat should look flat


def plot_scaling(records: list[dict[str, Any]], path: Path) -> None:
    """Curves of one kind, measured on one device in one dtype."""
    plt = pyplot()
    figure, panels = plt.subplots(
        2, len(records), figsize=(4.3 * len(records), 7.0), layout="constrained", squeeze=False, sharex="col"
    )
    for column, record in enumerate(records):
        for row, panel in enumerate(_PANELS):
            _panel(panels[row][column], record, *panel)
        held = ", ".join(f"{name} = {value:,}" for name, value in record["held"].items())
        panels[0][column].set_title(f"against {record['axis']}  ({held})\n{_said(record, 'time')}", **_SMALL)
        panels[1][column].set_title(_said(record, "memory"), **_SMALL)
        queries = record["curve"] == "train.B"
        panels[1][column].set_xlabel("B, queries (3 B texts)" if queries else _AXES[record["axis"]])
    panels[0][0].set_ylabel("milliseconds")
    panels[1][0].set_ylabel("peak extra MiB")
    panels[0][0].legend(loc="best", frameon=False, fontsize=8)
    first, origin = records[0], records[0]["provenance"]
    model = "" if first["shape"] is None else f"{first['shape']}, "
    title = f"{_TITLES[first['curve'].partition('.')[0]]}: {model}{first['dtype']}"
    where = (
        f"{origin['device']}, torch {origin['torch']}, {origin['date'][:10]}, "
        + ("\n" if len(records) == 1 else "")
        + f"commit {origin['commit'] or 'none'}, sources {origin['sources']}"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(where, fontsize=7.5, color=_GREY, x=0.01, ha="left")
    save_figure(plt, figure, path)


_SMALL: dict[str, Any] = {"loc": "left", "fontsize": 8.5, "color": "#444444"}


def _panel(axes: Any, record: dict[str, Any], what: str, measured: str, predicted: str, scale: float) -> None:
    several = len(record["series"]) > 1
    for one, style, other in zip(record["series"], _SERIES, _EAGER, strict=False):
        points = one["points"]
        sizes = [point["size"] for point in points]
        label = one["pass"] if several else "measured"
        axes.plot(sizes, [point[measured] * scale for point in points], label=label, linewidth=2, markersize=5, **style)
        name = f"{label}, predicted" if several else "predicted (time: the floor)"
        dotted = {"color": style["color"], "linestyle": ":", "linewidth": 1.6}
        axes.plot(sizes, [point[predicted] * scale for point in points], label=name, **dotted)
        eager = [(point["size"], point["eager"][measured] * scale) for point in points if point.get("eager")]
        if eager:
            axes.plot(*zip(*eager, strict=True), label=f"{label}, eager", linewidth=1, markersize=3.5, **other)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [point["size"] for point in record["series"][0]["points"]]
    axes.set_xticks(ticks, [_short(tick) for tick in ticks], fontsize=8.5)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < _LEAST_RANGE * low:
        middle, half = (low * high) ** 0.5, _LEAST_RANGE**0.5
        axes.set_ylim(middle / half, middle * half)
    plain_log_ticks(axes)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _short(size: int) -> str:
    """4096 -> 4k."""
    return f"{size // 1024}k" if size >= 4096 and size % 1024 == 0 else str(size)


def _said(record: dict[str, Any], what: str) -> str:
    """A line for each pass: measured slope, predicted slope, and whether they disagree."""
    lines = []
    for one in record["series"]:
        verdict = one[what]
        measured, predicted = (
            "none" if verdict[key] is None else f"{verdict[key]:.2f}".replace("-0.00", "0.00")
            for key in ("measured_slope", "predicted_slope")
        )
        name = f", {one['pass']}" if len(record["series"]) > 1 else ""
        wrong = "" if verdict["ok"] else "  NOT OK"
        lines.append(f"{what}{name}: slope {measured}, predicted {predicted}{wrong}")
    return "\n".join(lines)
