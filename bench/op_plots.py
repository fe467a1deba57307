"""Plots of the op benchmarks: time against rows on a CPU, distance from the floor on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import PASSES
from bench.plots import pyplot, save_figure

_STYLES: dict[str, dict[str, Any]] = {  # Okabe and Ito, as in bench/plots.py: ours blue, the baseline vermilion
    "ours": {"color": "#0072B2", "marker": "o"},
    "eager": {"color": "#D55E00", "marker": "s"},
    "compiled": {"color": "#009E73", "marker": "^"},
}
_GREY = "#777777"


def plot_op_rows(record: dict[str, Any], path: Path) -> None:
    """Milliseconds against T, a panel for each pass, with how many times as fast as eager ours is."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained", sharey=True)
    for axes, what in zip(panels, PASSES, strict=True):
        points = [point for point in record["points"] if point["pass"] == what]
        rows = [point["rows"] for point in points]
        floors = [(point["rows"], point["floor_milliseconds"]) for point in points if "floor_milliseconds" in point]
        if floors:  # older records have none
            axes.plot(*zip(*floors, strict=True), label="floor", color=_GREY, linestyle=":", linewidth=1.6)
        for name in ("eager", "compiled", "ours"):
            line = [(p["rows"], p["milliseconds"][name]) for p in points if name in p["milliseconds"]]
            if line:
                axes.plot(*zip(*line, strict=True), label=name, linewidth=2, **_STYLES[name])
        for point in points:
            axes.annotate(
                f"{point['speedup']:.1f}x",
                (point["rows"], point["milliseconds"]["ours"]),
                textcoords="offset points",
                xytext=(0, -14),
                ha="center",
                fontsize=9,
                color=_STYLES["ours"]["color"],
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(rows, [str(row) for row in rows])
        axes.minorticks_off()
        axes.margins(y=0.15)
        axes.set_xlabel("T, rows")
        axes.set_title(what, loc="left", fontsize=10)
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False, fontsize=9, loc="upper left")
    tied = "tied" if record["tied"] else "untied"
    origin = record["provenance"]
    figure.suptitle(
        f"soft_embed, {record['vocab']} x {record['hidden']} {tied}, {record['dtype']}", x=0.01, ha="left", fontsize=12
    )
    figure.supxlabel(f"{origin['device']}, torch {origin['torch']}", fontsize=7.5, color=_GREY, x=0.01, ha="left")
    save_figure(plt, figure, path)


def plot_op_floors(records: list[dict[str, Any]], path: Path) -> None:
    """Each case a line: every engine's time over the floor, and the target where there is one for it."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8.6, 1.4 + 0.24 * len(records)), layout="constrained")
    for y, record in enumerate(records):
        floor = record["floor_milliseconds"]
        axes.axhline(y, color=_GREY, linewidth=0.4, alpha=0.4, zorder=0)
        for name, style in _STYLES.items():
            found = record["engines"][name]
            if found is not None:
                axes.plot(found["milliseconds"] / floor, y, linestyle="", markersize=6, **style)
        bound = record["targets"].get("over_floor")
        if bound is not None:
            axes.plot(bound, y, "|", color="#222222", markersize=11, markeredgewidth=1.8)
    for name, style in _STYLES.items():
        axes.plot([], [], linestyle="", label=name, **style)
    axes.plot([], [], "|", color="#222222", markersize=11, markeredgewidth=1.8, label="target")
    axes.axvline(1, color=_GREY, linestyle=":", linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(records)), [record["case"] for record in records], fontsize=7.5)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlabel("time / floor")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    origin = records[0]["provenance"]
    text = f"{origin['device']}, torch {origin['torch']}, triton {origin['triton']}"
    figure.supxlabel(text, fontsize=7.5, color=_GREY, x=0.01, ha="left")
    save_figure(plt, figure, path)
