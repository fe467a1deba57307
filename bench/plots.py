"""The one way from numbers to a picture: a `Figure` says what is shown, `draw` makes a PNG of it.

Colours are those of Okabe and Ito. Each colour has a marker and a dash of its own, so that lines can be told apart in
print.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GREY, BLACK = -1, -2
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#222222", "#777777")
_MARKERS = "osD^vPX*"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), "-")
_SMALL: dict[str, Any] = {"fontsize": 9, "color": "#444444"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour.

    Attributes:
        color: a number from 0, or `GREY` or `BLACK`.
        style: "line"; "dotted", for what was predicted; "dots" without a line; "bar", horizontal, of length x at y.
        notes: a text beside each point, "" for none.
        ends: lowest and highest y of each point, shown as a whisker.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    style: str = "line"
    notes: Sequence[str] = ()
    ends: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        x_scale, y_scale: "linear", "log" (base 10), or "log2".
        x_ticks: where the horizontal axis is labelled; empty: where matplotlib likes.
        rows: names for y = 0, 1, .., from the top; empty where y is a number.
        y_from: least value that the vertical axis shows.
        least_range: the vertical axis' end is at least so many times its beginning, so that what is flat looks flat.
    """

    series: Sequence[Series]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"
    x_ticks: Sequence[float] = ()
    rows: Sequence[str] = ()
    y_from: float | None = None
    least_range: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a picture shows: panels in rows of `columns`, a title above, a caption below; sizes in inches."""

    panels: Sequence[Panel]
    title: str = ""
    caption: str = ""
    columns: int = 1
    width: float = 8.6
    height: float = 4.0


def draw(figure: Figure, path: Path) -> None:
    """Writes the PNG. matplotlib is imported here, so that nothing else needs it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(figure.panels) // figure.columns)
    canvas, grid = plt.subplots(
        rows, figure.columns, figsize=(figure.width, figure.height), layout="constrained", squeeze=False
    )
    explained: list[list[str]] = []
    for axes, panel in zip(grid.flat, figure.panels, strict=True):
        _panel(axes, panel)
        labels = axes.get_legend_handles_labels()[1]
        if labels not in explained:  # a legend for each set of lines
            axes.legend(framealpha=0.8, edgecolor="none", fontsize=8, loc="best")
            explained.append(labels)
    canvas.suptitle(figure.title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    canvas.supxlabel(figure.caption, fontsize=7.5, color=_COLORS[GREY], x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, format="png")
    plt.close(canvas)


def _panel(axes: Any, panel: Panel) -> None:
    for series in panel.series:
        _series(axes, series)
    for axis, scale, name in ((axes.xaxis, panel.x_scale, "x"), (axes.yaxis, panel.y_scale, "y")):
        if scale != "linear":
            getattr(axes, f"set_{name}scale")("log", base=2 if scale == "log2" else 10)
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda *_: "")
    if panel.x_ticks:
        axes.set_xticks(panel.x_ticks, [f"{tick:g}" for tick in panel.x_ticks])
        axes.minorticks_off()
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
        axes.set_ylim(len(panel.rows) - 0.4, -0.6)
        axes.margins(x=0.2)
    else:
        low, high = axes.get_ylim()
        if panel.y_scale == "log" and high < panel.least_range * low:
            middle, half = (low * high) ** 0.5, panel.least_range**0.5
            axes.set_ylim(middle / half, middle * half)
        if panel.y_scale == "log":  # 1, 2, 5, 10, .. unless those would be too many
            from matplotlib.ticker import LogLocator

            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 2e3 * low else (1.0,)))
        axes.set_ylim(bottom=panel.y_from)
    axes.set_title(panel.title, loc="left", **_SMALL)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _series(axes: Any, series: Series) -> None:
    look: dict[str, Any] = {"color": _COLORS[series.color], "label": series.label}
    if series.style == "bar":
        axes.barh(series.y, series.x, height=0.55, **look)
    elif series.style == "dotted":
        axes.plot(series.x, series.y, linestyle=":", linewidth=1.6, **look)
    else:
        line = _DASHES[series.color] if series.style == "line" else ""
        look |= {"marker": _MARKERS[series.color], "markersize": 5.5, "linestyle": line, "linewidth": 2}
        around = [
            (max(y - low, 0.0), max(high - y, 0.0)) for y, (low, high) in zip(series.y, series.ends, strict=False)
        ]
        axes.errorbar(series.x, series.y, yerr=list(zip(*around, strict=True)) or None, capsize=3, **look)
    for x, y, note in zip(series.x, series.y, series.notes, strict=False):
        beside = {"xytext": (4, 0), "va": "center"} if series.style == "bar" else {"xytext": (0, 8), "ha": "center"}
        axes.annotate(note, (x, y), textcoords="offset points", fontsize=8.5, color=look["color"], **beside)
