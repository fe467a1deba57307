"""The table at the end: one line a case, on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.suite.session import Record, Session, say
from bench.tables import Column, column, table
from bench.verdict import is_good


def lines_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the records have to say; a result that is not right has met nothing."""
    return [
        {**line, "met": line["met"] if is_good(record) else False, "agreement": record.get("agreement")}
        for record in records
        for line in record.get("lines", [])
    ]


def _milliseconds(name: str, key: str) -> Column:
    def text(line: dict[str, Any]) -> str:
        number = line.get(key)
        return "-" if number is None else f"{number:.3g}" if number < 1000 else f"{number:,.0f}"

    return name, text


def _met(line: dict[str, Any]) -> str:
    if not is_good(line):
        return line["agreement"]["verdict"]
    return {None: "-", True: "yes", False: "NO"}[line["met"]]


COLUMNS: list[Column] = [
    column("case", "case"),
    _milliseconds("floor ms", "floor"),
    _milliseconds("ours", "ours"),
    _milliseconds("baseline", "baseline"),
    column("x", "speedup", "{:.2f}"),
    ("target", lambda line: line["target"] or "-"),
    ("met", _met),
]


def shown(record: Record) -> str:
    """A record's lines on one."""
    lines = ([f"{name} {text(line)}" for name, text in COLUMNS[1:]] for line in lines_of([record]))
    return f"{record['case']}: " + "; ".join(", ".join(line) for line in lines)


def finish(session: Session, seconds: float, name: str = "summary") -> Record:
    """Prints the table and what is missing from it, and saves both under that name."""
    lines = lines_of(session.records)
    print("\n" + (table(COLUMNS, lines) if lines else ""))
    asked = [line for line in lines if line["met"] is not None]
    met = sum(line["met"] for line in asked)
    if session.skipped:
        say(f"no time for: {', '.join(session.skipped)}")
    for line in session.problems:
        say(f"PROBLEM: {line}")
    say(
        f"{met} of {len(asked)} targets met, {len(session.skipped)} skipped, {len(session.problems)} problems, "
        f"{seconds:.0f} s; baseline: eager PyTorch, official-style evaluation, the reference algorithm"
    )
    counts = {"seconds": seconds, "met": met, "with_target": len(asked)}
    left = {"skipped": session.skipped, "problems": session.problems}
    return session.save(name, {"benchmark": "summary", **counts, "lines": lines, **left})
