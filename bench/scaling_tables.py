"""The tables of a scaling record: its points, and the slopes with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.records import UNSTEADY
from bench.tables import Column


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.4g}"


def _eager(key: str, pattern: str, scale: float) -> Column:
    def value(point: dict[str, Any]) -> str:
        found = point.get("eager")
        return "-" if found is None else pattern.format(found[key] * scale)

    return {"seconds": "eager ms", "peak_extra_bytes": "eager MiB"}[key], value


POINTS: list[Column] = [
    ("pass", lambda p: p["pass"]),
    ("size", lambda p: f"{p['size']:,}"),
    ("ms", lambda p: f"{p['seconds'] * 1e3:,.4g}"),
    ("spread", lambda p: f"{p['spread']:.0%}"),
    ("floor ms", lambda p: f"{p['floor_seconds'] * 1e3:,.4g}"),
    ("time/floor", lambda p: f"{p['seconds'] / p['floor_seconds']:.2f}"),
    ("MiB", lambda p: _mebibytes(p["peak_extra_bytes"])),
    ("predicted MiB", lambda p: _mebibytes(p["predicted_bytes"])),
    _eager("seconds", "{:,.4g}", 1e3),
    _eager("peak_extra_bytes", "{:,.4g}", 1 / 2**20),
]


def _slope(key: str, name: str) -> Column:
    return name, lambda row: "-" if row[key] is None else f"{row[key]:.2f}".replace("-0.00", "0.00")


def _verdict(row: dict[str, Any]) -> str:
    return ("ok" if row["ok"] else "NOT OK") + (", unsteady" if row["unsteady"] else "")


SLOPES: list[Column] = [
    ("curve", lambda row: row["label"]),
    ("of", lambda row: row["what"]),
    ("sizes", lambda row: row["sizes"]),
    _slope("predicted_slope", "predicted slope"),
    _slope("measured_slope", "measured slope"),
    ("tolerance", lambda row: f"{row['tolerance']:.2f}"),
    ("verdict", _verdict),
    ("measured / predicted", lambda row: "-" if row["over_prediction"] is None else _range(row["over_prediction"])),
]


def _range(ends: Sequence[float]) -> str:
    low, high = (f"{end:.2f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def rows_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for the time and one for the memory of each series."""
    rows = []
    for record in records:
        for one in record["series"]:
            label = record["curve"] + (f", {one['pass']}" if len(record["series"]) > 1 else "")
            sizes = [point["size"] for point in one["points"]]
            span = f"{min(sizes):,} to {max(sizes):,}" if sizes else "none"
            spread = max((point["spread"] for point in one["points"]), default=0.0)
            for what in ("time", "memory"):
                unsteady = what == "time" and spread > UNSTEADY
                rows.append({"label": label, "what": what, "sizes": span, "unsteady": unsteady, **one[what]})
    return rows
