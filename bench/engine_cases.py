"""What the generation engine is held to on a GPU: runs of `bench/run.py`, and the figures that are read off them.

A figure is a ratio within one record: the engine's step to the step's floor, its speed to official-style evaluation,
its time with K steps to its time without. Ratios carry over between machines better than milliseconds do, and the
floor belongs to the machine that it was measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.engines import GRAPH, OFFICIAL_EVAL

Record = dict[str, Any]

_BATCH, _STEPS = 64, (0, 5, 20)
# rows that the engine gets at once where one decode batch is to be as large as the memory for keys and values allows
_MANY = 512


class Figure(NamedTuple):
    """One bound.

    Attributes:
        words: what is measured.
        measure: the value in a record; None where its points are not there.
        at_least: whether `bound` is a lower bound.
        bound: the value to reach.
    """

    words: str
    measure: Callable[[Record], float | None]
    at_least: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.words} {'>=' if self.at_least else '<='} {self.bound:g}"

    def met(self, record: Record) -> bool:
        """What could not be measured is not met."""
        value = self.measure(record)
        return value is not None and (value >= self.bound if self.at_least else value <= self.bound)


@dataclass(frozen=True)
class EngineCase:
    """A run of `bench/run.py` and its figures.

    Attributes:
        name: of the record's file.
        arguments: of `bench/run.py`.
        figures: what it is held to.
        seconds: about how long it takes on an H100, loading and checks included.
    """

    name: str
    arguments: list[str]
    figures: list[Figure]
    seconds: float


def judge(record: Record, case: EngineCase) -> Record:
    """The record with the case's name, its verdict in the form of the op records, and a line for each figure."""
    misses = [f"{figure}: {_shown(figure, record)}" for figure in case.figures if not figure.met(record)]
    return {
        **record,
        "case": case.name,
        "target": ", ".join(map(str, case.figures)) or None,
        "target_lines": [
            f"target {figure}: {_shown(figure, record)}, {'met' if figure.met(record) else 'NOT met'}"
            for figure in case.figures
        ],
        "misses": misses,
        "met": not misses if case.figures else None,
    }


def _shown(figure: Figure, record: Record) -> str:
    value = figure.measure(record)
    return "not measured" if value is None else f"{value:.3g}"


def _rows(record: Record) -> list[Record]:
    """The engine's points, by K."""
    return sorted((row for row in record.get("points", []) if row["engine"] == GRAPH), key=lambda r: r["num_steps"])


def step_over_floor(record: Record) -> float | None:
    """Seconds per step between the two largest K over the floor of the same steps: prompt and call cancel."""
    if len(rows := _rows(record)) < 2:
        return None
    low, high = rows[-2:]
    return (high["seconds"] - low["seconds"]) / (high["floor_seconds"] - low["floor_seconds"])


def speedup_over_official(record: Record) -> float | None:
    """At the largest K."""
    rows = _rows(record)
    return rows[-1]["speedup_over_official"] if rows else None


def growth(record: Record) -> float | None:
    """Time at the largest K over the time at K = 0."""
    rows = _rows(record)
    return rows[-1]["time_over_zero"] if rows else None


def _against_official(shape: str, length: int, step: float, speedup: float | None, seconds: float) -> EngineCase:
    arguments = ["--shape", shape, "--dtype", "bfloat16", "--batch", str(_BATCH), "--length", str(length)]
    arguments += ["--steps", *map(str, _STEPS), "--engines", OFFICIAL_EVAL, "cached", GRAPH, "--repeats", "5"]
    figures = [Figure("step / its floor", step_over_floor, False, step)]
    if speedup is not None:
        figures.append(Figure(f"x {OFFICIAL_EVAL}, K = {_STEPS[-1]}", speedup_over_official, True, speedup))
    return EngineCase(f"engine-{shape}-N{length}", arguments, figures, seconds)


def _growth(shape: str, bound: float, seconds: float) -> EngineCase:
    # `--batch` rows go to the engine in one call; it takes as many at once as its memory for keys and values holds
    arguments = ["--shape", shape, "--dtype", "bfloat16", "--batch", str(_MANY), "--length", "512"]
    arguments += ["--steps", "0", str(_STEPS[-1]), "--engines", GRAPH, "--repeats", "3", "--latency", "0"]
    figure = Figure(f"encode(K = {_STEPS[-1]}) / encode(K = 0)", growth, False, bound)
    return EngineCase(f"engine-{shape}-corpus-N512", arguments, [figure], seconds)


# In the order of their worth: whatever time is left, the head of this list is measured.
ENGINE_CASES = [
    _against_official("qwen2.5-0.5b", 32, step=1.5, speedup=15.0, seconds=50),
    _against_official("mistral-7b", 32, step=1.2, speedup=3.5, seconds=70),
    _against_official("mistral-7b", 512, step=1.2, speedup=1.4, seconds=120),
    _growth("mistral-7b", 1.15, seconds=90),
    _growth("qwen2.5-0.5b", 1.25, seconds=40),
    _against_official("qwen2.5-0.5b", 512, step=1.5, speedup=None, seconds=60),
]

_TINY = [
    "--shape",
    "smollm2-135m",
    "--layers",
    "1",
    "--batch",
    "2",
    "--length",
    "8",
    "--repeats",
    "1",
    "--latency",
    "0",
]
# The suite's dry run. The bounds are made up: one that is met, one that is not.
SMOKE_ENGINE_CASES = [
    EngineCase(
        "engine-smoke",
        [*_TINY, "--steps", "0", "1", "2", "--engines", OFFICIAL_EVAL, GRAPH],
        [
            Figure("step / its floor", step_over_floor, False, 1e9),
            Figure(f"x {OFFICIAL_EVAL}, K = 2", speedup_over_official, True, 1e9),
        ],
        10,
    )
]
