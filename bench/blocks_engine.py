"""The tables and the figure of docs/engine.md: Jacobi decoding."""

from __future__ import annotations

from statistics import fmean

from bench import jacobi, jacobi_quality
from bench.blocks_performance import versions
from bench.documents import Record, Results, block
from bench.plots import Figure, Panel, Series
from bench.tables import column, filled, markdown

_SHOWN = 60  # characters of a model's path
_CLOSE = 1e-3  # the default tolerance
_STARTS = [
    column("start", "start"),
    column("passes", "passes"),
    column("positions", "positions"),
    column("1 - cosine: mean", "mean", "{:.1e}"),
    column("largest", "largest", "{:.1e}"),
]


@block("jacobi-quality")
def quality(results: Results) -> str:
    """Passes and what they change; starts of the passes; the figure."""
    parts = []
    for name, record in _records(results, "quality"):
        figure = results.figure(name, "1 - cosine to the sequential embedding after each pass", _figure(record))
        parts += [
            _caption(results, name, record),
            markdown(jacobi_quality.COLUMNS, record["points"]),
            figure,
            f"Starts of the passes, trained models: what each takes until the mean is below {_CLOSE:g}.",
            markdown(_STARTS, _starts(record)),
        ]
    return "\n\n".join(parts) or "no record yet: `python bench/jacobi.py quality`"


@block("jacobi-speed")
def speed(results: Results) -> str:
    parts = []
    for name, record in _records(results, "speed"):
        columns = filled(jacobi.SPEED_COLUMNS, record["points"])
        what = f"{record['model'][-_SHOWN:]}, {record['dtype']}. "
        parts += [_caption(results, name, record, what), markdown(columns, record["points"])]
    return "\n\n".join(parts) or "no record yet: `python bench/jacobi.py speed`"


def _records(results: Results, kind: str) -> list[tuple[str, Record]]:
    return [(name, record) for name, record in results.of("jacobi").items() if record["kind"] == kind]


def _caption(results: Results, name: str, record: Record, what: str = "") -> str:
    return f"`{name}.json`{results.mark(record)}: {what}{versions([record])}; `{record['provenance']['command']}`"


def _starts(record: Record) -> list[dict[str, object]]:
    """For each start the means over the trained models."""
    lines: dict[tuple[str, int], list[dict[str, float]]] = {}
    for point in record["starts"]:
        if point["model"] != "untrained":
            lines.setdefault((point["start"], point["passes"]), []).append(point)
    found: dict[str, dict[str, object]] = {}
    for (start, passes), points in lines.items():
        mean, largest = fmean(point["mean"] for point in points), max(point["largest"] for point in points)
        if mean < _CLOSE and start not in found:
            found[start] = {"passes": passes, "positions": points[0]["positions"], "mean": mean, "largest": largest}
    return [{"start": start} | found.get(start, {}) for start in jacobi_quality.STARTS]


def _figure(record: Record) -> Figure:
    """A line for each model: the mean after each pass of all positions."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in record["starts"]:
        if point["start"] == next(iter(jacobi_quality.STARTS)):
            lines.setdefault(f"{point['corpus']}: {point['model']}", []).append((point["passes"], point["mean"]))
    series = [
        Series(label=label, x=[x for x, _ in line], y=[max(y, 1e-7) for _, y in line], color=color)
        for color, (label, line) in enumerate(lines.items())
    ]
    panel = Panel(series=series, x_label="passes", y_label="1 - cosine to the sequential embedding", y_scale="log")
    return Figure(panels=[panel], caption=versions([record]))
