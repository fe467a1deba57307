"""The first table of docs/performance.md: every benchmark at its largest job, one line each, on the same columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.agreement import OK
from bench.cases import CASES, PASSES
from bench.documents import NO_RECORD, Record, Results, block
from bench.engines import GRAPH, OFFICIAL_EVAL, REFERENCE
from bench.tables import Column, column, markdown

# Of the op cases on a GPU: one of each regime, of a tied and an untied model.
_OPS = [
    case.name
    for case in CASES
    if case.model in ("qwen2.5-0.5b", "qwen2.5-7b") and (case.rows in (64, 1024) or case.what != PASSES[0])
]
_Row = dict[str, Any]


def _milliseconds(key: str) -> Column:
    def text(row: _Row) -> str:
        number = row.get(key)
        shown = "-" if number is None else f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
        return shown if key != "ours" or row["verdict"] == OK else f"{shown} {row['verdict']}"

    return f"{key} ms", text


_COLUMNS: list[Column] = [
    column("what", "what"),
    column("where", "where"),
    _milliseconds("floor"),
    _milliseconds("ours"),
    ("ours / floor", lambda row: "-" if row.get("floor") is None else f"{row['ours'] / row['floor']:.2f}"),
    _milliseconds("eager"),
    _milliseconds("compiled"),
    _milliseconds("official-style"),
    column("record", "record"),
]


@block("at-a-glance")
def at_a_glance(results: Results) -> str:
    rows: list[_Row] = []
    for kind, read in _READ.items():
        some: list[_Row] = []
        for name, record in results.of(kind).items():
            verdict = (record.get("agreement") or {}).get("verdict", OK)  # of the suite; `run.py` has one for each row
            where = {"where": record["provenance"]["device"], "record": f"`{name}`{results.mark(record)}"}
            some += [{"verdict": verdict, **where, **row} for row in read(record)]
        rows += sorted(some, key=lambda row: row["where"])
    on_gpu = any(record["provenance"]["driver"] for record in results.of(*_READ).values())
    return markdown(_COLUMNS, rows) + ("" if on_gpu else f"\n\nOn a GPU: {NO_RECORD}")


def _op(record: Record) -> Iterator[_Row]:
    if record["device"] == "cuda" and record["case"] in _OPS:
        engines = {name: engine["milliseconds"] for name, engine in record["engines"].items() if engine is not None}
        yield {"what": f"`soft_embed`, {record['case']}", "floor": record["floor_milliseconds"], **engines}


def _soft_embed(record: Record) -> Iterator[_Row]:
    """The fewest and the most rows."""
    rows = [point["rows"] for point in record["points"]]
    for point in record["points"]:
        if point["rows"] in (min(rows), max(rows)):
            what = f"`soft_embed`, {record['shape']}, T = {point['rows']}, {point['pass']}"
            yield {"what": what, "floor": point.get("floor_milliseconds"), **point["milliseconds"]}


def _info_nce(record: Record) -> Iterator[_Row]:
    for point in record["points"]:
        sizes = f"B = {point['rows']:,}, M = {point['candidates']:,}, K = {point['num_steps']}, D = {point['width']:,}"
        what = f"`stepwise_info_nce`, {sizes}, forward+backward"
        yield {"what": what, "floor": point.get("floor_milliseconds"), **point["milliseconds"]}


def _run(record: Record) -> Iterator[_Row]:
    """A record of `bench/run.py`, at its largest K; nothing where ours failed."""
    steps = max((row["num_steps"] for row in record["points"]), default=0)
    rows = {row["engine"]: row for row in record["points"] if row["num_steps"] == steps}
    ours = rows.get(GRAPH) or rows.get("cached")
    if ours is None:
        return
    batch = record["batch"]
    job = {
        "throughput": f"encoding {batch['texts']} x {batch['length']} tokens",
        "corpus": f"encoding {batch['texts']:,} texts of a corpus",
        "training": f"a training step, {batch['texts']} x {batch['length']} tokens",
    }[record["benchmark"]]
    others = {"eager": rows.get(REFERENCE), "official-style": rows.get(OFFICIAL_EVAL)}
    yield {
        "what": f"{job}, {record['model']['name']}, {record['model']['dtype']}, K = {steps}",
        "floor": ours["floor_seconds"] * 1e3,
        "ours": ours["seconds"] * 1e3,
        **({"verdict": ours["verdict"]} if ours.get("verdict", OK) != OK else {}),
        **{name: row["seconds"] * 1e3 for name, row in others.items() if row is not None},
    }


_READ: dict[str, Callable[[Record], Iterator[_Row]]] = {
    "op": _op,
    "soft_embed": _soft_embed,
    "info_nce": _info_nce,
    "throughput": _run,
    "corpus": _run,
    "training": _run,
}
