"""Plots of the records. Colours of Okabe and Ito, and a marker and a dash of its own for each line, so that they can be
told apart in print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.engines import GRAPH, NO_REUSE, OFFICIAL_EVAL, REFERENCE, SINGLE_PASS

_STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1))},
    {"color": "#56B4E9", "marker": "P", "linestyle": (0, (1, 1))},
    {"color": "#8C6D31", "marker": "X", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
]
_FIRST = ("cached", REFERENCE, OFFICIAL_EVAL, GRAPH, NO_REUSE)  # keep their style whatever else is in the plot
_GREY, _BLACK = "#777777", "#222222"


def draw(record: dict[str, Any]) -> Callable[[dict[str, Any], Path], None]:
    """The function that draws a record of `bench/run.py`."""
    if record["benchmark"] == "training":
        return plot_training
    official = any(row.get("speedup_over_official") is not None for row in record["points"])
    return plot_engines if official or "generation" in record else plot_throughput


def plot_engines(record: dict[str, Any], path: Path) -> None:
    """Left: texts per second against K, one line per engine, the single pass as a level, the floor as a dotted line.
    Right: how the time grows with K, each engine's time(K) / time(0) beside the floor's."""
    plt = pyplot()
    rows, texts = record["points"], record["batch"]["texts"]
    names = [name for name in dict.fromkeys(row["engine"] for row in rows) if name != SINGLE_PASS]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.2), layout="constrained", width_ratios=(1.5, 1))
    floor = {row["num_steps"]: row for row in rows}
    steps = sorted(floor)
    dotted = {"color": _GREY, "linestyle": ":", "linewidth": 1.6, "label": "floor of the job"}
    left.plot(steps, [texts / floor[k]["floor_seconds"] for k in steps], **dotted)
    right.plot(steps, [floor[k]["floor_over_zero"] for k in steps], **dotted)
    for row in rows:
        if row["engine"] == SINGLE_PASS:
            left.axhline(row["texts_per_second"], color=_BLACK, linewidth=0.8, zorder=1)
            left.plot([0], [row["texts_per_second"]], "*", color=_BLACK, markersize=11, label="single pass (K = 0)")
    for name in names:
        line = [row for row in rows if row["engine"] == name]
        style = {"linewidth": 2, "markersize": 6, "label": name, **_style(name, names)}
        rates = [row["texts_per_second"] for row in line]
        # records hold six digits: of a single run the ends may lie beside the middle
        low = [max(0.0, rate - texts / max(row["runs"])) for rate, row in zip(rates, line, strict=True)]
        high = [max(0.0, texts / min(row["runs"]) - rate) for rate, row in zip(rates, line, strict=True)]
        left.errorbar([row["num_steps"] for row in line], rates, yerr=[low, high], capsize=3, **style)
        grown = [row for row in line if row["time_over_zero"] is not None]
        right.plot([row["num_steps"] for row in grown], [row["time_over_zero"] for row in grown], **style)
    left.set_ylabel("texts per second")
    right.set_ylabel("time at K / time at K = 0")
    for axes in (left, right):
        axes.set_yscale("log")
        plain_log_ticks(axes)
        axes.set_xticks(steps)
        axes.set_xlabel("K, generated soft tokens per text")
        axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="best", fontsize=9)
    _title(figure, left, record, f"Encoding speed against K (labels: times as fast as {OFFICIAL_EVAL})")
    labelled = [row for row in rows if row["engine"] in names and row["engine"] != OFFICIAL_EVAL]
    _label_points(left, labelled, "speedup_over_official", {name: _style(name, names)["color"] for name in names})
    save_figure(plt, figure, path)


_LABEL_HEIGHT, _ABOVE = 10.5, 8.0  # points


def stacked(heights: list[float]) -> list[float]:
    """Heights of points, in points -> of the lower edges of their labels: above the point, and where another point's
    marker or label would be there, above all of these, in the order of the points."""
    found = [0.0] * len(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    while order:
        group = [order.pop(0)]
        # whoever is lower than the top of the labels that the group would have
        while order and heights[order[0]] < heights[group[-1]] + _ABOVE + _LABEL_HEIGHT * len(group):
            group.append(order.pop(0))
        for place, index in enumerate(group):
            found[index] = heights[group[-1]] + _ABOVE + _LABEL_HEIGHT * place
    return found


def _label_points(axes: Any, rows: list[dict[str, Any]], key: str, colors: dict[str, str]) -> None:
    """`row[key]` as "1.5x" above each point with K > 0, in its engine's colour.

    Where points of one K lie close together their labels are stacked above all of them, in the points' order. The axes
    must have their scale and the figure its size.
    """
    from matplotlib.patheffects import withStroke

    axes.figure.draw_without_rendering()
    points = 72 / axes.figure.dpi
    for steps in sorted({row["num_steps"] for row in rows} - {0}):
        labelled = [row for row in rows if row["num_steps"] == steps and row[key] is not None]
        heights = [axes.transData.transform((steps, row["texts_per_second"]))[1] * points for row in labelled]
        labels = stacked(heights)
        for row, height, label in zip(labelled, heights, labels, strict=True):
            axes.annotate(
                f"{row[key]:.1f}x",
                (steps, row["texts_per_second"]),
                textcoords="offset points",
                xytext=(0, label - height),
                ha="center",
                fontsize=9,
                color=colors[row["engine"]],
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )


# For records from before official-eval was among the engines. The docs' figures of these carry a digest of this source:
# an edit has them drawn again.
def plot_throughput(record: dict[str, Any], path: Path) -> None:
    """Texts per second against K, one line per engine, the single pass as a level, the floor as a dotted line."""
    plt = pyplot()
    rows = record["points"]
    names = [name for name in dict.fromkeys(row["engine"] for row in rows) if name != SINGLE_PASS]
    figure, axes = plt.subplots(figsize=(8.2, 5.0), layout="constrained")
    texts = record["batch"]["texts"]
    floor = {row["num_steps"]: texts / row["floor_seconds"] for row in rows}
    axes.plot(
        sorted(floor),
        [floor[k] for k in sorted(floor)],
        color=_GREY,
        linestyle=":",
        linewidth=1.6,
        label="floor of the job",
    )
    for row in rows:
        if row["engine"] == SINGLE_PASS:
            axes.axhline(row["texts_per_second"], color=_BLACK, linewidth=0.8, zorder=1)
            axes.plot([0], [row["texts_per_second"]], "*", color=_BLACK, markersize=11, label="single pass (K = 0)")
    for name in names:
        line = [row for row in rows if row["engine"] == name]
        steps = [row["num_steps"] for row in line]
        low = [row["texts_per_second"] - texts / max(row["runs"]) for row in line]
        high = [texts / min(row["runs"]) - row["texts_per_second"] for row in line]
        rates = [row["texts_per_second"] for row in line]
        axes.errorbar(
            steps, rates, yerr=[low, high], capsize=3, linewidth=2, markersize=6, label=name, **_style(name, names)
        )
    for row in rows:
        if row["engine"] not in (REFERENCE, SINGLE_PASS) and row["num_steps"] and row["speedup_over_recompute"]:
            axes.annotate(
                f"{row['speedup_over_recompute']:.1f}x",
                (row["num_steps"], row["texts_per_second"]),
                textcoords="offset points",
                xytext=(0, 8),
                ha="center",
                fontsize=9,
                color=_style(row["engine"], names)["color"],
            )
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xticks(sorted(floor))
    axes.set_xlabel("K, generated soft tokens per text")
    axes.set_ylabel("texts per second")
    axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=9)
    _title(figure, axes, record, f"Encoding speed against K (labels: times as fast as {REFERENCE})")
    save_figure(plt, figure, path)


def plot_training(record: dict[str, Any], path: Path) -> None:
    """Two bar charts, seconds and peak memory of one training step per engine, at the largest K."""
    plt = pyplot()
    rows = [row for row in record["points"] if row["num_steps"] == max(record["num_steps"])]
    names = [row["engine"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 1.9 + 0.55 * len(rows)), layout="constrained", sharey=True)
    colors = [_style(name, names)["color"] for name in names]
    seconds = [row["seconds"] for row in rows]
    bars = left.barh(names, seconds, color=colors, height=0.55)
    left.bar_label(bars, [f"{s:.3g} s" + _speedup(row) for s, row in zip(seconds, rows, strict=True)], padding=4)
    left.axvline(rows[0]["floor_seconds"], color=_GREY, linestyle=":", linewidth=1.8)
    left.annotate(
        "floor",
        (rows[0]["floor_seconds"], 1.0),
        xycoords=("data", "axes fraction"),
        color=_GREY,
        ha="center",
        va="bottom",
        fontsize=9,
    )
    left.set_xlabel("seconds per step")
    left.set_xlim(0, 1.3 * max(seconds))
    gib = [(row["loaded_bytes"] / 2**30, row["peak_extra_bytes"] / 2**30) for row in rows]
    right.barh(names, [base for base, _ in gib], color="#cccccc", height=0.55, label="model loaded")
    bars = right.barh(
        names,
        [extra for _, extra in gib],
        left=[base for base, _ in gib],
        color=colors,
        height=0.55,
        hatch="//",
        edgecolor="white",
    )
    right.bar_label(bars, [f"{base + extra:.2f} GiB" for base, extra in gib], padding=4)
    right.set_xlabel("peak memory, GiB (grey: before the step)")
    right.set_xlim(0, 1.3 * max(base + extra for base, extra in gib))
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    _title(figure, None, record, "One training step")
    save_figure(plt, figure, path)


def _speedup(row: dict[str, Any]) -> str:
    ratio = row["speedup_over_recompute"]
    return "" if ratio is None or row["engine"] == REFERENCE else f" ({ratio:.1f}x)"


def _style(name: str, names: list[str]) -> dict[str, Any]:
    order = [*_FIRST, *(other for other in names if other not in _FIRST)]
    return _STYLES[order.index(name) % len(_STYLES)]


def plain_log_ticks(axes: Any) -> None:
    """1, 2, 5, 10, .. on the vertical axis instead of powers of ten; powers of ten where those would be too many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if high < 2e3 * low else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _title(figure: Any, axes: Any, record: dict[str, Any], title: str) -> None:
    from bench.records import describe

    origin = record["provenance"]
    model, batch = describe(record)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    small = {"fontsize": 9, "color": "#444444"}
    text = f"{model}\n{batch}"
    if axes is None:
        figure.supxlabel(f"{model}; {batch}\n{_origin(origin)}", fontsize=7.5, color=_GREY, x=0.01, ha="left")
    else:
        axes.set_title(text, loc="left", **small)
        figure.supxlabel(_origin(origin), fontsize=7.5, color=_GREY, x=0.01, ha="left")


def _origin(origin: dict[str, Any]) -> str:
    return (
        f"{origin['device']}, torch {origin['torch']}, transformers {origin['transformers']}, {origin['date'][:10]}, "
        f"commit {origin['commit'] or 'none'}, sources {origin['sources']}"
    )


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
