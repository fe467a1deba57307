"""The points of a comparison, each an engine at one K: timed in turns, then one JSON object for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from bench.agreement import reason
from bench.engines import OFFICIAL_EVAL, REFERENCE, SINGLE_PASS
from bench.memory import give_back
from bench.timing import Timing
from gircse.roofline import Ceilings, Work


@dataclass(frozen=True)
class Point:
    """One engine at one K."""

    engine: str
    num_steps: int


@dataclass
class Trial:
    """What the runs of a point gave.

    Attributes:
        seconds: of each timed run.
        peak: bytes that a run allocates at its peak, where they were counted.
        result: of the last run, where it is kept.
        failed: the reason where a run raised; nothing else is kept then.
    """

    point: Point
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    result: Any = None
    failed: str | None = None

    @property
    def failure(self) -> dict[str, Any]:
        """The JSON object of a point that failed."""
        return {"engine": self.point.engine, "num_steps": self.point.num_steps, "failed": self.failed}


def take_turns(
    points: Iterable[Point],
    warm_up: Callable[[Trial], None],
    timed: Callable[[Trial], float],
    repeats: int,
    device: torch.device,
    *,
    interleave: bool = True,
    most_seconds: float | None = None,
    title: str = "bench",
) -> Iterator[list[Trial]]:
    """Runs every point once untimed and then all points in turn, so that drifts of the machine hit all alike.

    Args:
        warm_up: the untimed run; it may fill in the trial's peak and result.
        timed: a run. -> its seconds.
        interleave: takes turns over all points. Otherwise the points of one K take turns, and are finished before the
            next K begins.
        most_seconds: a point that has run for longer in all is not repeated any more.

    Yields:
        the trials of the points that took turns. A point that raised is left out from then on.
    """
    todo = list(points)
    groups = (
        [todo] if interleave else [[p for p in todo if p.num_steps == k] for k in sorted({p.num_steps for p in todo})]
    )
    with tqdm(total=len(todo) * (repeats + 1), desc=title, unit="run", disable=None, leave=False) as progress:
        for group in groups:
            trials = [Trial(point) for point in group]
            for count in range(repeats + 1):
                for trial in trials:
                    enough = most_seconds is not None and sum(trial.seconds) > most_seconds
                    if trial.failed is None and not enough:
                        try:
                            if count == 0:
                                warm_up(trial)
                            else:
                                trial.seconds.append(timed(trial))
                        except Exception as error:  # one that fails must not cost the others their figures
                            trial.failed, trial.seconds, trial.result = reason(error), [], None
                    if trial.failed is not None and not enough:
                        give_back(device)  # outside `except`: the traceback would keep tensors alive
                    progress.update()
            yield trials


def point_row(
    point: Point,
    timings: dict[Point, Timing],
    lengths: Sequence[int],
    work: list[Work],
    work_at_zero: list[Work] | None,
    ceilings: Ceilings,
) -> dict[str, Any]:
    """The JSON object of a point: rates, ratios to the other engines and to K = 0, the floor.

    Args:
        timings: of all points that it is compared with.
        lengths: prompt tokens of every text.
        work, work_at_zero: phases of the job at the point's K, and at K = 0 where the floors are to be compared.
    """
    timing, k = timings[point], point.num_steps
    texts, tokens = len(lengths), sum(lengths) + k * len(lengths)
    floor = ceilings.seconds(work)

    def speedup_over(other: Point) -> float | None:
        return timings[other].seconds / timing.seconds if other in timings else None

    at_zero = timings.get(Point(point.engine, 0))
    return {
        "engine": point.engine,
        "num_steps": k,
        "seconds": timing.seconds,
        "spread": timing.spread,
        "runs": timing.runs,
        "texts_per_second": texts / timing.seconds,
        "tokens_per_second": tokens / timing.seconds,
        "speedup_over_recompute": speedup_over(Point(REFERENCE, k)),
        "speedup_over_official": speedup_over(Point(OFFICIAL_EVAL, k)),
        "texts_ratio_to_single_pass": speedup_over(Point(SINGLE_PASS, 0)),
        "time_over_zero": timing.seconds / at_zero.seconds if at_zero is not None else None,
        "floor_over_zero": floor / ceilings.seconds(work_at_zero) if work_at_zero is not None else None,
        "flops": sum(phase.flops for phase in work),
        "bytes": sum(phase.bytes for phase in work),
        "floor_seconds": floor,
        "time_over_floor": timing.seconds / floor,
    }
