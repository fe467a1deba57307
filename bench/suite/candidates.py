"""Named alternatives of a kernel against the committed table's choice, in at most 90 seconds for all of them.

The file is a JSON list. `case` is a name of `bench.cases`, the alternatives are those of `bench.suite.alternatives`::

    [{"case": "qwen2.5-0.5b-T64-forward-bfloat16",
      "alternatives": {"few rows": {"plan": {"FEW_ROWS": 64}}, "epilogue": {"many_rows": {"epilogue": true}}}}]

`candidates.json`, beside this file, asks what the last run left open, what is worth most first: in form 3 who takes
the exponential and how large a chunk is, forward and backward; up to how many rows wide matrices are read once; tiles,
warps, stages and programs of forms 1 and 2; who searches for top-p's threshold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.agreement import relative_error
from bench.cases import CASES, MODELS, SMOKE_CASES, Case
from bench.op_engines import TOLERANCE, Problem, draw_matrices, ours
from bench.suite.alternatives import Alternative, check, using
from bench.suite.session import Session, say
from bench.tables import Column, table
from bench.timing import captured, for_about
from bench.verdict import first_line

TABLE = "table"  # the name of the committed choice
SECONDS = 90.0
_FEWEST = 5


class Candidates(NamedTuple):
    """One entry of the file."""

    case: Case
    alternatives: dict[str, Alternative]


def read(path: Path) -> list[Candidates]:
    """Raises ValueError, with the place, for a file that is not as above."""
    known = {case.name: case for case in (*CASES, *SMOKE_CASES)}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: got {type(entries).__name__}, expected a list")
    found = []
    for number, entry in enumerate(entries):
        where = f"{path}[{number}]"
        if not isinstance(entry, dict) or entry.keys() != {"case", "alternatives"}:
            raise ValueError(f"{where}: got {entry!r}, expected an object with case and alternatives")
        case, alternatives = entry["case"], entry["alternatives"]
        if not isinstance(case, str) or case not in known:
            raise ValueError(f"{where}: got case {case!r}, expected one of {', '.join(known)}")
        if not isinstance(alternatives, dict) or TABLE in alternatives:
            raise ValueError(f"{where}: got alternatives {alternatives!r}, expected an object of names, none {TABLE!r}")
        for name, alternative in alternatives.items():
            check(f"{where}.{name}", alternative)
        found.append(Candidates(known[case], {TABLE: {}, **alternatives}))
    return found


class Race(NamedTuple):
    """Median seconds of each alternative that ran, and what went wrong with the others."""

    seconds: dict[str, float]
    failed: dict[str, str]

    @property
    def winner(self) -> str:
        return min(self.seconds, key=lambda name: self.seconds[name])


def race(run: Callable[[], Any], alternatives: Mapping[str, Alternative], device: torch.device, budget: float) -> Race:
    """All alternatives in turn, for about `budget` seconds, each as a CUDA graph where there is one: planning and
    launching have no part in it."""
    runs: dict[str, Callable[[], Any]] = {}
    kept, failed = [], {}
    for name, alternative in alternatives.items():
        try:
            runs[name], graph = _prepared(run, alternative, device)
        except Exception as error:  # noqa: PERF203
            failed[name] = first_line(error)
        else:
            kept.append(graph)
    found = {name: timing.seconds for name, timing in for_about(runs, device, budget, fewest=_FEWEST).items()}
    del kept
    return Race(found, failed)


def _prepared(run: Callable[[], Any], alternative: Alternative, device: torch.device) -> tuple[Callable[[], Any], Any]:
    """-> what is timed, and what must be kept alive for it."""
    if device.type != "cuda":

        def eager() -> None:
            with using(alternative):
                run()

        eager()
        return eager, None
    with using(alternative):
        return captured(run, device)


def time_file(session: Session, path: Path) -> None:
    """Prints the winners and saves `candidates.json`; a case that no longer fits is named."""
    entries, deadline = read(path), time.perf_counter() + min(SECONDS, session.left())
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        left = deadline - time.perf_counter()
        if left <= 0:
            session.skipped += [f"candidates of {late.case.name}" for late in entries[number:]]
            break
        name = f"candidates-{entry.case.name}"
        if not session.fits(name, 0.0):
            continue
        with session.surviving(name):
            rows += _raced(session, entry, min(3.0, left / (len(entries) - number)))
    say("\n" + table(_COLUMNS, rows))
    session.save("candidates", {"benchmark": "candidates", "file": path.name, "rows": rows})


def _raced(session: Session, entry: Candidates, budget: float) -> list[dict[str, Any]]:
    case, device = entry.case, session.device
    matrices = draw_matrices(MODELS[case.model], case.torch_dtype, device)
    problem = Problem.draw(case.rows, case.what, *matrices, case.variant)
    wrong = _wrong(problem, entry)
    found = race(problem.call(ours), entry.alternatives, device, budget)
    right = {name: took for name, took in found.seconds.items() if name not in wrong}
    rows = []
    for name in entry.alternatives:
        took = found.seconds.get(name)
        rows.append(
            {
                "case": case.name,
                "alternative": name,
                "milliseconds": None if took is None else took * 1e3,
                "over_table": None if took is None or TABLE not in found.seconds else took / found.seconds[TABLE],
                "wins": name in right and right[name] == min(right.values()),
                "why": found.failed.get(name) or wrong.get(name),
            }
        )
    return rows


def _wrong(problem: Problem, entry: Candidates) -> dict[str, str]:
    """Alternatives that give something else than the table's choice does."""
    found, expected = {}, None
    for name, alternative in entry.alternatives.items():
        try:
            with using(alternative):
                results = problem.results(ours)
        except Exception:  # `race` says why
            continue
        if expected is None:
            expected = results
        eps = torch.finfo(problem.hidden.dtype).eps
        errors = {key: relative_error(value, expected[key]) for key, value in results.items()}
        if not all(error <= TOLERANCE * eps for error in errors.values()):
            found[name] = f"WRONG: {', '.join(f'{key} off by {error:.1e}' for key, error in errors.items())}"
    return found


_COLUMNS: list[Column] = [
    ("case", lambda row: row["case"]),
    ("alternative", lambda row: row["alternative"]),
    ("ms", lambda row: "-" if row["milliseconds"] is None else f"{row['milliseconds']:.4g}"),
    ("of the table's", lambda row: "-" if row["over_table"] is None else f"{row['over_table']:.3f}"),
    ("", lambda row: row["why"] or ("WINS" if row["wins"] else "")),
]
