"""Records to text: one table per mode, columns aligned, a dash where there is nothing to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.agreement import OK
from bench.verdict import is_good

Column = tuple[str, Callable[[dict[str, Any]], str]]


def _number(key: str, pattern: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    def value(row: dict[str, Any]) -> str:
        found = row.get(key)
        return "-" if found is None else pattern.format(found * scale)

    return value


_SPEED: list[Column] = [
    ("engine", lambda row: row["engine"]),
    ("K", lambda row: str(row["num_steps"])),
    ("seconds", _number("seconds", "{:.4g}")),
    ("spread", _number("spread", "{:.0%}")),
    ("texts/s", _number("texts_per_second", "{:,.4g}")),
    ("tokens/s", _number("tokens_per_second", "{:,.0f}")),
]
_OFFICIAL: Column = ("x official", _number("speedup_over_official", "{:.2f}x"))
_COMMON: list[Column] = [
    *_SPEED,
    ("x recompute", _number("speedup_over_recompute", "{:.2f}x")),
]
_FLOOR: list[Column] = [
    ("floor s", _number("floor_seconds", "{:.4g}")),
    ("time/floor", _number("time_over_floor", "{:.2f}")),
]
_OVER_ZERO: list[Column] = [
    ("time(K)/time(0)", _number("time_over_zero", "{:.2f}")),
    ("floor(K)/floor(0)", _number("floor_over_zero", "{:.2f}")),
]
_SINGLE_PASS: Column = ("of single-pass", _number("texts_ratio_to_single_pass", "{:.0%}"))
_LATENCY: list[Column] = [
    ("1 text p50 ms", _number("latency_p50", "{:,.4g}", 1e3)),
    ("p95 ms", _number("latency_p95", "{:,.4g}", 1e3)),
]
# WRONG or UNCHECKED; where all is well, and in older records, there is no such column
_CHECK: Column = ("check", lambda row: "-" if row.get("verdict", OK) == OK else row["verdict"])
THROUGHPUT = [*_COMMON, _OFFICIAL, _SINGLE_PASS, *_FLOOR, *_OVER_ZERO, *_LATENCY, _CHECK]
CORPUS = [*_SPEED, _OFFICIAL, *_FLOOR, *_OVER_ZERO, _CHECK]
# what older records do not have, and what a run may leave out: no column of dashes
_OPTIONAL = {name for name, _ in (_OFFICIAL, *_OVER_ZERO, *_LATENCY, _CHECK)}
TRAINING = [
    *_COMMON,
    ("peak GiB", _number("peak_bytes", "{:.2f}", 1 / 2**30)),
    ("over model GiB", _number("peak_extra_bytes", "{:.2f}", 1 / 2**30)),
    ("peak/recompute", _number("peak_ratio_to_recompute", "{:.2f}")),
    *_FLOOR,
    *_OVER_ZERO,
    _CHECK,
]


def columns_of(record: dict[str, Any]) -> list[Column]:
    """The columns that a record of `bench/run.py` fills."""
    columns = {"training": TRAINING, "corpus": CORPUS}.get(record["benchmark"], THROUGHPUT)
    rows = record["points"]
    return [(name, value) for name, value in columns if name not in _OPTIONAL or any(value(r) != "-" for r in rows)]


def _milliseconds(engine: str) -> Callable[[dict[str, Any]], str]:
    """Of an engine in an op record; why there is none, where there is none."""

    def value(record: dict[str, Any]) -> str:
        found = record["engines"][engine]
        return record["failures"].get(engine, "-") if found is None else f"{found['milliseconds']:.4g}"

    return value


def _verdict(record: dict[str, Any]) -> str:
    if record["met"] is None:
        return "-"
    return "yes" if record["met"] else "NO: " + "; ".join(record["misses"])


def _ours(record: dict[str, Any]) -> str:
    """Marked where the numbers are not right."""
    found = f"{record['milliseconds']:.4g}"
    return found if is_good(record) else f"{found} {record['agreement']['verdict']}"


OPS: list[Column] = [
    ("case", lambda record: record["case"]),
    ("floor ms", _number("floor_milliseconds", "{:.4g}")),
    ("ours ms", _ours),
    ("time/floor", _number("over_floor", "{:.2f}")),
    ("eager ms", lambda record: record["failures"].get("eager") or _number("eager_milliseconds", "{:.4g}")(record)),
    ("compiled ms", _milliseconds("compiled")),
    ("x eager", _number("speedup", "{:.2f}x")),
    ("x eager, plain calls", _number("plain_speedup", "{:.2f}x")),
    ("extra MiB", _number("extra_bytes", "{:.1f}", 1 / 2**20)),
    ("of eager's", _number("memory_ratio", "{:.3f}")),
    ("target", lambda record: record["target"] or "-"),
    ("met", _verdict),
]


def _plain(name: str) -> Column:
    """Milliseconds of a call that is no graph."""
    return f"{name} ms, plain call", _milliseconds(name)


def _host(name: str) -> Column:
    def value(record: dict[str, Any]) -> str:
        found = record["replay"]["host_microseconds"].get(name)
        return "-" if found is None else f"{found:.0f}"

    return f"host us to launch: {name}", value


def _replayed(name: str) -> Column:
    def value(record: dict[str, Any]) -> str:
        found = record["replay"]["milliseconds"].get(name)
        return record["replay"]["why"].get(name, "-") if found is None else f"{found:.4g}"

    return f"{name} ms, graph", value


REPLAY: list[Column] = [
    ("case", lambda record: record["case"]),
    *(make(name) for make in (_replayed, _plain, _host) for name in ("ours", "eager")),
]


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """First column left, the others right; a rule below the header."""
    cells = [[name for name, _ in columns], *([value(row) for _, value in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        return "  ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True)))

    return "\n".join([line(cells[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, cells[1:])])


def markdown(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """The same for a document: cells are not padded, so that one changed number changes one line."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([line([name for name, _ in columns]), rule, *(line([f(row) for _, f in columns]) for row in rows)])
