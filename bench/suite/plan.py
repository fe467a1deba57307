"""`gircse train --plan` against measured memory: `bench/plan_check.py`, case by case."""

from __future__ import annotations

from bench import plan_check
from bench.suite.session import Session, say


def run(session: Session) -> None:
    """All cases are one record; a prediction that is off is a problem, and is measured again at the next call."""
    name = "plan"
    finished = session.finished(name)
    if finished is not None and finished["met"]:
        session.records.append(finished)
        return
    smoke = session.smoke
    points = []
    for case in plan_check.SMOKE_CASES if smoke else plan_check.CASES:
        if session.fits(f"{name} {case.shape}", 3 if smoke else 12):
            with session.surviving(f"{name} {case.shape}"):
                points.append(plan_check.check(case, session.device))
                say(f"plan: {case.shape}, error {points[-1]['error']:+.1%}")
    if not points:
        return
    worst = max((point["error"] for point in points), key=abs)
    met = abs(worst) <= plan_check.TOLERANCE
    line = {
        "case": f"plan of {len(points)} steps: worst error {worst:+.1%}",
        "target": f"within {plan_check.TOLERANCE:.0%}",
        "met": met,
    }
    session.keep(
        name,
        {"benchmark": "plan", "tolerance": plan_check.TOLERANCE, "points": points, "met": met, "lines": [line]},
    )
    if not met:
        session.problem(f"plan: the worst prediction is {worst:+.1%} off, {line['target']} is expected")
