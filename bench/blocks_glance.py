"""The first table of docs/performance.md: every benchmark at its largest job, one line each, on the same columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.agreement import OK
from bench.cases import CASES, PASSES
from bench.documents import NO_RECORD, Record, Results, block
from bench.engines import GRAPH, OFFICIAL_EVAL, REFERENCE
from bench.tables import Column, markdown

# Of the op cases on a GPU: one of each regime, of a tied and an untied model.
_OPS = [
    case.name
    for case in CASES
    if case.model in ("qwen2.5-0.5b", "qwen2.5-7b") and (case.rows in (64, 1024) or case.what != PASSES[0])
]


def _milliseconds(key: str) -> Column:
    def value(row: dict[str, Any]) -> str:
        found = row.get(key)
        text = "-" if found is None else f"{found:,.0f}" if found >= 1000 else f"{found:.3g}"
        return text if key != "ours" or row["verdict"] == OK else f"{text} {row['verdict']}"

    return f"{key} ms", value


def _ratio(row: dict[str, Any]) -> str:
    return "-" if row.get("floor") is None else f"{row['ours'] / row['floor']:.2f}"


_COLUMNS: list[Column] = [
    ("what", lambda row: row["what"]),
    ("where", lambda row: row["where"]),
    _milliseconds("floor"),
    _milliseconds("ours"),
    ("ours / floor", _ratio),
    _milliseconds("eager"),
    _milliseconds("compiled"),
    _milliseconds("official-style"),
    ("record", lambda row: row["record"]),
]


@block("at-a-glance")
def at_a_glance(results: Results) -> str:
    rows: list[dict[str, Any]] = []
    for name, record in results.records.items():
        read = _READ.get(record.get("benchmark", ""))
        if read is None:
            continue
        common = {"where": record["provenance"]["device"], "record": f"`{name}`{results.mark(record)}"}
        verdict = (record.get("agreement") or {}).get("verdict", OK)  # of the suite; `run.py` has one for each row
        rows += [{"verdict": verdict, **common, **row} for row in read(record)]
    order = list(_READ)
    rows.sort(key=lambda row: (order.index(row["benchmark"]), row["where"]))  # stable: records by name
    on_gpu = any(record["provenance"]["driver"] for record in results.records.values() if "benchmark" in record)
    return "\n\n".join([markdown(_COLUMNS, rows), *([] if on_gpu else [f"On a GPU: {NO_RECORD}"])])


def _op(record: Record) -> Iterator[dict[str, Any]]:
    if record["device"] != "cuda" or record["case"] not in _OPS:
        return
    engines = {name: found["milliseconds"] for name, found in record["engines"].items() if found is not None}
    what = f"`soft_embed`, {record['case']}"
    yield {"benchmark": "op", "what": what, "floor": record["floor_milliseconds"], **engines}


def _soft_embed(record: Record) -> Iterator[dict[str, Any]]:
    few, many = (choose(point["rows"] for point in record["points"]) for choose in (min, max))
    for point in record["points"]:
        if point["rows"] in (few, many):
            what = f"`soft_embed`, {record['shape']}, T = {point['rows']}, {point['pass']}"
            yield {"benchmark": "soft_embed", "what": what, **point["milliseconds"]} | {
                "floor": point.get("floor_milliseconds")
            }


def _info_nce(record: Record) -> Iterator[dict[str, Any]]:
    for point in record["points"]:
        sizes = f"B = {point['rows']:,}, M = {point['candidates']:,}, K = {point['num_steps']}, D = {point['width']:,}"
        times = {name: point["milliseconds"].get(name) for name in ("ours", "eager", "compiled")}
        yield {"benchmark": "info_nce", "what": f"`stepwise_info_nce`, {sizes}, forward+backward", **times} | {
            "floor": point.get("floor_milliseconds")
        }


def _run(record: Record) -> Iterator[dict[str, Any]]:
    """A record of `bench/run.py`, at its largest K."""
    steps = max((row["num_steps"] for row in record["points"]), default=0)  # none where every engine failed
    rows = {row["engine"]: row for row in record["points"] if row["num_steps"] == steps}
    ours = rows.get(GRAPH) or rows.get("cached")
    if ours is None:
        return
    model, batch = record["model"]["name"], record["batch"]
    job = {
        "throughput": f"encoding {batch['texts']} x {batch['length']} tokens",
        "corpus": f"encoding {batch['texts']:,} texts of a corpus",
        "training": f"a training step, {batch['texts']} x {batch['length']} tokens",
    }[record["benchmark"]]
    others = {"eager": rows.get(REFERENCE), "official-style": rows.get(OFFICIAL_EVAL)}
    yield {
        "benchmark": record["benchmark"],
        "what": f"{job}, {model}, {record['model']['dtype']}, K = {steps}",
        "floor": ours["floor_seconds"] * 1e3,
        "ours": ours["seconds"] * 1e3,
        **({"verdict": ours["verdict"]} if ours.get("verdict", OK) != OK else {}),
        **{name: row["seconds"] * 1e3 for name, row in others.items() if row is not None},
    }


_READ = {
    "op": _op,
    "soft_embed": _soft_embed,
    "info_nce": _info_nce,
    "throughput": _run,
    "corpus": _run,
    "training": _run,
}
