"""The tables and the figure of docs/engine.md: Jacobi decoding."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from bench import jacobi, jacobi_quality
from bench.blocks_performance import versions
from bench.documents import Record, Results, block
from bench.plots import Figure, Panel, Series
from bench.tables import Column, column, filled, markdown

_SHOWN = 60  # characters of a model's path
_CLOSE = 1e-3  # the default tolerance
_DISTANCES = jacobi_quality.DISTANCES
_QUALITY: list[Column] = [
    column("corpus", "corpus"),
    column("K", "num_steps"),
    column("way", "way"),
    column("passes", "passes", "{:.1f}"),
    column("most", "most_passes"),
    *_DISTANCES,
    column("nDCG@10", "ndcg", "{:.4f}"),
    column("change", "change", "{:+.4f}"),
    column("largest change", "largest_change", "{:+.4f}"),
]
_STARTS = [
    column("start", "start"),
    column("passes", "passes"),
    column("positions", "positions"),
    *_DISTANCES[::2],
]


_MEANS = ("passes", "mean", "p99", "ndcg", "change")
_LARGEST = ("most_passes", "largest")


@block("jacobi-quality")
def quality(results: Results) -> str:
    """Passes and what they change; starts of the passes; the figure."""
    parts = []
    for name, record in _records(results, "quality"):
        figure = results.figure(name, "1 - cosine to the sequential embedding after each pass", _figure(record))
        parts += [
            _caption(results, name, record),
            "Means over the models of a corpus, one for each seed; the largest values are those over all.",
            markdown(_QUALITY, _quality(record)),
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


def _quality(record: Record) -> list[dict[str, Any]]:
    """A line for each corpus (and the untrained model on it), K and way. With a smaller K than the largest only the
    default tolerance, and none of the untrained model, for which the figure shows the passes."""
    largest_steps = max(point["num_steps"] for point in record["points"])
    sequential: dict[tuple[str, str, int], float] = {}
    lines: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for point in record["points"]:
        model = point["model"], point["corpus"], point["num_steps"]
        untrained, largest = point["model"] == "untrained", point["num_steps"] == largest_steps
        if untrained and not largest:
            continue
        corpus = point["corpus"] + (", untrained" if untrained else "")
        if "passes" not in point:
            sequential[model], way = point["ndcg"], "sequential"
        elif "tolerance" in point and (largest or point["tolerance"] == _CLOSE):
            way = f"tolerance {point['tolerance']:g}"
        elif "after" in point and largest and not untrained:
            way = f"{point['after']} pass{'es' if point['after'] > 1 else ''}"
        else:
            continue
        change = {"change": point["ndcg"] - sequential[model]} if "passes" in point else {}
        lines.setdefault((corpus, point["num_steps"], way), []).append(point | change)
    rows = []
    for (corpus, num_steps, way), points in lines.items():
        row: dict[str, Any] = {"corpus": corpus, "num_steps": num_steps, "way": way}
        row |= {name: fmean(point[name] for point in points) for name in _MEANS if name in points[0]}
        row |= {name: max(point[name] for point in points) for name in _LARGEST if name in points[0]}
        if "change" in row:
            row["largest_change"] = max((point["change"] for point in points), key=abs)
        rows.append(row)
    return rows


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
