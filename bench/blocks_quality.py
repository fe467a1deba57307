"""The tables and the figure of docs/quality.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.documents import Record, Results, block
from bench.plots import Figure, Panel, Series
from bench.quality_arms import ARMS, SCALES
from bench.quality_stats import Estimate, Run, difference, estimate, per_query
from bench.tables import Column, Row, column, markdown

SHOWN_STEPS = (0, 1, 2, 3, 5, 7, 10, 15, 20)
ENCODERS = ("encoder-only", "encoder-only-long", "encoder-only-longer")
MAIN = (
    *("encoder-only", "one-step", "paper", "factor-1", "factor-0.1", "block", "ten-steps"),
    *(
        "encoder-only-long",
        "paper-long",
        "factor-1-long",
        "block-long",
        "ten-steps-long",
        "encoder-only-longer",
        "ten-steps-longer",
    ),
    *("distilled", "distilled-fresh"),
)
DRAWN = (
    "encoder-only",
    "encoder-only-long",
    "factor-1",
    "paper-long",
    "factor-1-long",
    "block",
    "ten-steps",
    "ten-steps-long",
)
NO_STUDY = "not in the record yet: `python bench/quality.py`"

Arms = dict[str, dict[int, Run]]  # arm -> seed -> run


def grouped(record: Record, corpus: str) -> Arms:
    """The runs on a corpus, in the order of `ARMS`."""
    arms: Arms = {}
    for run in record["runs"]:
        if run["corpus"] == corpus:
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    return {arm: arms[arm] for arm in ARMS if arm in arms}


def own_steps(arm: str) -> int:
    """The K that an arm is judged at: what it was trained for, 5 where that is a range."""
    steps = ARMS[arm].settings.get("num_steps", 5)
    return steps if isinstance(steps, int) else 5


def training_seconds(runs: dict[int, Run]) -> float:
    """Of one run: the quietest seed's share of the runs that were trained at once."""
    return min(run["step_seconds"] * run["steps"] / run.get("runs_at_once", 1) for run in runs.values())


def same_steps(arm: str) -> str:
    """The encoder-only arm with as many steps."""
    return ENCODERS[{1: 0, 2: 1, 4: 2}[ARMS[arm].budget]]


def same_time(arm: str, arms: Arms) -> str:
    """The longest encoder-only arm that trained for no longer than `arm`, its teacher's training included."""
    teacher = ARMS[arm].teacher
    seconds = training_seconds(arms[arm]) + (training_seconds(arms[teacher]) if teacher else 0)
    fitting = [name for name in ENCODERS if name in arms and training_seconds(arms[name]) <= seconds * 1.02]
    return fitting[-1] if fitting else ENCODERS[0]


def _interval(name: str, key: str, sign: str = "") -> Column:
    """A mean with its interval; `sign` "+" for a difference."""

    def text(row: Row) -> str:
        value: Estimate | None = row[key]
        return "-" if value is None else f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"

    return name, text


def _row(arm: str, arms: Arms) -> Row:
    runs, k = arms[arm], own_steps(arm)

    def against(other: str) -> Estimate | None:
        return difference(runs, arms.get(other, {}), k, 0) if other != arm else None

    timed = same_time(arm, arms)
    return {
        "arm": arm,
        "what": ARMS[arm].what,
        "steps": next(iter(runs.values()))["steps"],
        "seeds": ", ".join(map(str, sorted(runs))),
        "seconds": training_seconds(runs),
        "k": k,
        "value": estimate(per_query(list(runs.values()), k)),
        "spearman": float(np.mean([run["spearman"][k] for run in runs.values()])),
        "norm": [float(np.mean([run["grad_norm"][i] for run in runs.values()])) for i in (0, 1)],
        "steps_gain": against(same_steps(arm)),
        "time_gain": against(timed),
        "one": difference(runs, runs, k, 1) if k > 1 else None,
        "twenty": difference(runs, runs, 20, k) if k else None,
        "ten": difference(runs, runs, 10, 1),
        "curve": [float(np.mean([run["ndcg"][i] for run in runs.values()])) for i in range(21)],
    }


_ARM, _WHAT = column("arm", "arm", "`{}`"), column("trained", "what")


@block("quality")
def main_table(results: Results) -> str:
    """Whether generation pays: every arm against encoder-only, after as many steps and in the same time."""
    columns = [
        _ARM,
        _WHAT,
        column("steps", "steps"),
        column("seeds", "seeds"),
        column("seconds", "seconds", "{:.0f}"),
        _interval("nDCG@10", "value"),
        _interval("minus encoder-only, same steps", "steps_gain", "+"),
        _interval("minus encoder-only, same time", "time_gain", "+"),
        _interval("own K minus K = 1", "one", "+"),
        _interval("K = 20 minus own K", "twenty", "+"),
        column("Spearman", "spearman", "{:.3f}"),
        ("gradient norm", lambda row: f"{row['norm'][0]:.0f}, {row['norm'][1]:.1f}"),
    ]
    return _sections(results, lambda arms: markdown(columns, [_row(arm, arms) for arm in MAIN if arm in arms]))


@block("quality-tried")
def tried(results: Results) -> str:
    """What later steps add in every other arm."""
    columns = [
        _ARM,
        _WHAT,
        *[(f"K = {k}", lambda row, k=k: f"{row['curve'][k]:.3f}") for k in (0, 1, 5, 10, 20)],
        _interval("K = 10 minus K = 1", "ten", "+"),
    ]
    others = ["block", *(arm for arm in ARMS if arm not in MAIN)]

    def shown(arms: Arms) -> str:
        rows = [_row(arm, arms) for arm in others if arm in arms]
        return markdown(columns, rows) if rows else ""

    return _sections(results, shown)


@block("quality-figure")
def figure(results: Results) -> str:
    """nDCG@10 against K at inference, one panel a corpus."""
    records = results.of("quality")
    if not records:
        return NO_STUDY
    lines = []
    for record in records.values():
        panels = []
        for corpus in record["corpora"]:
            arms = grouped(record, corpus)
            series = []
            for number, arm in enumerate(name for name in DRAWN if name in arms):
                curve, encoder = _row(arm, arms)["curve"], not own_steps(arm)
                label = f"{arm} ({next(iter(arms[arm].values()))['steps']} steps)"
                x = [0, 20] if encoder else list(range(1, 21))
                y = [curve[0]] * 2 if encoder else curve[1:]
                series.append(Series(label=label, x=x, y=y, color=number, style="dotted" if encoder else "line"))
            axes: dict[str, Any] = {"x_ticks": SHOWN_STEPS, "y_label": "nDCG@10", "x_label": "K, soft tokens"}
            panels.append(Panel(series=series, title=corpus, **axes))
        drawn = Figure(panels=panels, columns=len(panels), width=10.0)
        lines.append(results.figure(f"quality-{record['scale']}", "nDCG@10 against K on both corpora", drawn))
    return "\n\n".join(lines)


def _sections(results: Results, table: Any) -> str:
    """A table for each corpus of each record, below a line that says which."""
    parts = []
    for record in results.of("quality").values():
        for corpus, size in record["corpora"].items():
            arms = grouped(record, corpus)
            train = SCALES[record["scale"]].train
            if not (shown := table(arms)):
                continue
            parts.append(
                f"**{corpus}**{results.mark(record)} ({record['base']}, {train['batch_size']} rows a step out of "
                f"{size['training']:,}, {size['queries']} queries, {size['documents']} documents; "
                f"{record['provenance']['device']}, {record['provenance']['date'][:10]})\n\n{shown}"
            )
    return "\n\n".join(parts) or NO_STUDY
