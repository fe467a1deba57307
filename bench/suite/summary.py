"""The table at the end: one line a case, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.suite.session import Record, Session, say
from bench.tables import Column, table
from bench.verdict import is_good


def lines_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the records have to say; a result that is not right has met nothing."""
    return [
        {**line, "met": line["met"] if is_good(record) else False, "agreement": record.get("agreement")}
        for record in records
        for line in record.get("lines", [])
    ]


def _milliseconds(key: str) -> Callable[[dict[str, Any]], str]:
    def value(line: dict[str, Any]) -> str:
        found = line.get(key)
        return "-" if found is None else f"{found:.3g}" if found < 1000 else f"{found:,.0f}"

    return value


def _times(line: dict[str, Any]) -> str:
    return "-" if line.get("speedup") is None else f"{line['speedup']:.2f}"


def _met(line: dict[str, Any]) -> str:
    if not is_good(line):
        return line["agreement"]["verdict"]
    return {None: "-", True: "yes", False: "NO"}[line["met"]]


COLUMNS: list[Column] = [
    ("case", lambda line: line["case"]),
    ("floor ms", _milliseconds("floor")),
    ("ours", _milliseconds("ours")),
    ("baseline", _milliseconds("baseline")),
    ("x", _times),
    ("target", lambda line: line["target"] or "-"),
    ("met", _met),
]


def shown(record: Record) -> str:
    """A record's lines on one."""
    return "; ".join(
        f"{line['case']}: {_milliseconds('ours')(line)} ms, floor {_milliseconds('floor')(line)}, "
        f"baseline {_milliseconds('baseline')(line)}, {_met(line)}"
        for line in lines_of([record])
    )


def finish(session: Session, seconds: float, name: str = "summary") -> Record:
    """Prints the table and what is missing from it, and saves both under that name."""
    lines = lines_of(session.records)
    print()
    if lines:
        print(table(COLUMNS, lines))
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
    summary = {
        "benchmark": "summary",
        "seconds": seconds,
        "met": met,
        "with_target": len(asked),
        "lines": lines,
        "skipped": session.skipped,
        "problems": session.problems,
    }
    return session.save(name, summary)
