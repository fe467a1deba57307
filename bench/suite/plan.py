"""`gircse train --plan` against measured memory: `bench/plan_check.py`, case by case."""

from __future__ import annotations

from bench import plan_check
from bench.suite.session import Session, say


def run(session: Session) -> None:
    """All cases are one record; where a prediction is off, that is a problem, and the next call measures again."""
    if session.had("plan", lambda record: record["met"]):
        return
    points = []
    for case in plan_check.SMOKE_CASES if session.smoke else plan_check.CASES:
        name = f"plan {case.shape}"
        if session.fits(name, 3 if session.smoke else 12):
            with session.surviving(name):
                points.append(plan_check.check(case, session.device))
                say(f"{name}, error {points[-1]['error']:+.1%}")
    if not points:
        return
    worst, tolerance = max((point["error"] for point in points), key=abs), plan_check.TOLERANCE
    what, met = f"plan of {len(points)} steps: worst error {worst:+.1%}", abs(worst) <= tolerance
    line = {"case": what, "target": f"within {tolerance:.0%}", "met": met}
    session.keep("plan", {"benchmark": "plan", "tolerance": tolerance, "points": points, "met": met, "lines": [line]})
    if not met:
        session.problem(f"{what}, expected {line['target']}")
