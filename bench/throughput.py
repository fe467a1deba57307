"""Texts and tokens per second against K, interleaved timings, each beside its floor; the latency of a single text.

What is timed is kept: `bench.encode_check` says afterwards whether it may be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.agreement import reason
from bench.batches import Batch
from bench.engines import ENGINES, OFFICIAL_EVAL, REFERENCE, SINGLE_PASS, Generation, Run
from bench.memory import give_back
from bench.timing import Timing, seconds
from gircse.lm.causal_lm import CausalLM
from gircse.ops import l2_normalize, pool_steps
from gircse.roofline import Ceilings, ModelFacts, Work


@dataclass(frozen=True)
class Point:
    """One engine at one K."""

    engine: str
    num_steps: int


def points(engines: list[str], steps: list[int]) -> list[Point]:
    """In the order they are timed: for each K every engine, so that drifts of the machine hit all of them alike.

    The single pass has one point, K = 0, whether or not 0 is among the steps.
    """
    found = [Point(SINGLE_PASS, 0)] if SINGLE_PASS in engines else []
    return found + [Point(name, k) for k in steps for name in engines if ENGINES[name].steps]


@torch.no_grad()
def embed(run: Run, lm: CausalLM, batch: Batch, num_steps: int) -> Tensor:
    """Final embeddings [B, D], float32, length 1: what is timed."""
    return l2_normalize(pool_steps(run(lm, *batch, num_steps))[:, -1])


@dataclass(frozen=True)
class Measured:
    """A point that has been timed.

    Attributes:
        row: its JSON object (`point_row`); where the call raised, `engine`, `num_steps` and the reason as `failed`.
        embeddings: [B, D] float32 on the CPU, of the last timed run; None where it failed.
    """

    point: Point
    row: dict[str, Any]
    embeddings: Tensor | None


def measure(
    lm: CausalLM,
    facts: ModelFacts,
    ceilings: Ceilings,
    batch: Batch,
    engines: list[str],
    steps: list[int],
    repeats: int,
    *,
    shared_prefix: int = 0,
    interleave: bool = True,
    most_seconds: float | None = None,
) -> Iterator[Measured]:
    """Times every engine at every K of the (ascending) `steps`; compares nothing (`bench.encode_check`).

    Args:
        interleave: all points in turn, so that drifts of the machine hit all alike, and all are finished at the end;
            else the engines of one K in turn, whose points are finished before the next K begins.
        most_seconds: a point that has run for so long in all is not repeated any more.
    """
    todo = points(engines, steps)
    groups = (
        [todo] if interleave else [[p for p in todo if p.num_steps == k] for k in sorted({p.num_steps for p in todo})]
    )
    timings: dict[Point, Timing] = {}
    lengths = batch.lengths
    for group in groups:
        runs = _run(lm, group, batch, repeats, "bench", most_seconds)
        timings |= {run.point: Timing.of(run.seconds) for run in runs if run.seconds}
        for run in runs:
            point = run.point
            if run.failed is not None:
                yield _failed(run)
                continue
            work = facts.inference(lengths, point.num_steps, shared_prefix=shared_prefix)
            at_zero = facts.inference(lengths, 0, shared_prefix=shared_prefix)
            row = point_row(point, timings, lengths, work, at_zero, ceilings)
            yield Measured(point, row | {"peak_extra_bytes": run.peak}, run.embeddings)


def latency(lm: CausalLM, text: Batch, engines: list[str], steps: list[int], runs: int) -> Iterator[Measured]:
    """One text at a time: what somebody who waits for a single embedding sees.

    Args:
        text: a batch of one row.
        steps: the K to measure.
        runs: of each point, interleaved, after one that is not counted.

    Yields:
        rows of `latency_p50` and `latency_p95` in seconds alone, percentiles over the runs (linear between two runs: of
        few runs the 95th is close to the slowest); where a call raised, as in `measure`.
    """
    for run in _run(lm, points(engines, steps), text, runs, "latency", None):
        if run.failed is not None:
            yield _failed(run)
            continue
        row = {f"latency_p{p}": float(np.percentile(run.seconds, p)) for p in (50, 95)}
        yield Measured(run.point, row, run.embeddings)


def point_row(
    point: Point,
    timings: dict[Point, Timing],
    lengths: list[int],
    work: list[Work],
    work_at_zero: list[Work],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """The JSON object of a point: rates, ratios to the other engines and to K = 0, the floor.

    Args:
        timings: of all points that it is compared with.
        lengths: prompt tokens of every text.
        work, work_at_zero: phases of the job at the point's K, and at K = 0.
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
        "floor_over_zero": floor / ceilings.seconds(work_at_zero),
        "flops": sum(phase.flops for phase in work),
        "bytes": sum(phase.bytes for phase in work),
        "floor_seconds": floor,
        "time_over_floor": timing.seconds / floor,
    }


def generation_reports(lm: CausalLM, engines: list[str]) -> dict[str, dict[str, Any]]:
    """What each generation engine keeps in memory, the graphs that it captured, and why it captured none."""
    runs = {name: ENGINES[name].run for name in engines}
    return {name: run.report(lm) for name, run in runs.items() if isinstance(run, Generation)}


@dataclass
class _Runs:
    """What the timed runs of a point gave."""

    point: Point
    seconds: list[float] = field(default_factory=list)
    embeddings: Tensor | None = None
    peak: int | None = None
    failed: str | None = None


def _failed(runs: _Runs) -> Measured:
    point = runs.point
    return Measured(point, {"engine": point.engine, "num_steps": point.num_steps, "failed": runs.failed}, None)


def _run(
    lm: CausalLM, todo: list[Point], batch: Batch, repeats: int, title: str, most_seconds: float | None
) -> list[_Runs]:
    """Warm-up, then every point in turn, `repeats` times. A point whose call raises is left out from then on."""
    found = [_Runs(point) for point in todo]
    with tqdm(total=len(todo) * (repeats + 1), desc=title, unit="run", disable=None, leave=False) as progress:
        for count in range(repeats + 1):
            for runs in found:
                enough = most_seconds is not None and sum(runs.seconds) > most_seconds
                if runs.failed is None and not enough:
                    try:
                        _one(lm, runs, batch, warm_up=count == 0)
                    except Exception as error:  # one that fails must not cost the others their figures
                        runs.failed, runs.seconds, runs.embeddings = reason(error), [], None
                        give_back(lm.device)
                progress.update()
    for runs in found:
        runs.embeddings = None if runs.embeddings is None else runs.embeddings.cpu()
    return found


def _one(lm: CausalLM, runs: _Runs, batch: Batch, *, warm_up: bool) -> None:
    def call() -> None:
        runs.embeddings = embed(run, lm, batch, runs.point.num_steps)

    with ENGINES[runs.point.engine].attached(lm) as run:
        if not warm_up:
            runs.seconds.append(seconds(call, lm.device))
            return
        before = _reset_peak(lm.device)
        call()
        # bytes above what was allocated before (CUDA only)
        runs.peak = None if before is None else torch.cuda.max_memory_allocated(lm.device) - before


def _reset_peak(device: torch.device) -> int | None:
    """Bytes allocated now; None where the allocator does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
