"""Texts and tokens per second against K: agreement first, then interleaved timings, each beside its floor; then the
latency of a single text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.agreement import Difference, embedding_difference
from bench.batches import Batch, check_lengths, random_batch
from bench.engines import ENGINES, OFFICIAL_EVAL, REFERENCE, SINGLE_PASS, Generation
from bench.timing import Timing, seconds
from gircse.architecture import CausalLM
from gircse.floors import Ceilings, ModelFacts, Work
from gircse.ops import l2_normalize, pool_steps


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
def embed(lm: CausalLM, engine: str, batch: Batch, num_steps: int) -> Tensor:
    """Final embeddings [B, D], float32, length 1: what is timed."""
    return l2_normalize(pool_steps(ENGINES[engine].run(lm, *batch, num_steps))[:, -1])


@contextmanager
def _attached(lm: CausalLM, engine: str) -> Iterator[None]:
    with ENGINES[engine].attached(lm):
        yield


def check_agreement(
    lm: CausalLM, engines: list[str], num_steps: int, length: int, *, seed: int, shared_prefix: int = 0
) -> list[Difference]:
    """Every engine against the reference on four rows, two of them padded, at the largest K and at K = 0.

    Args:
        length: tokens of the longest row beyond the `shared_prefix` that all rows start with.

    Raises:
        Disagreement: with the measured difference.
    """
    lengths = [shared_prefix + own for own in check_lengths(length)]
    vocab = lm.embed_weight.shape[0]
    batch = random_batch(vocab, lengths, seed=seed + 1, device=lm.device, shared_prefix=shared_prefix)
    differences = []
    for steps in sorted({0, num_steps}):
        with _attached(lm, REFERENCE):
            expected = embed(lm, REFERENCE, batch, steps)
        for name in engines:
            if name == REFERENCE or (steps and not ENGINES[name].steps):
                continue
            with _attached(lm, name):
                ours = embed(lm, name, batch, steps)
            what = f"{len(expected)} rows of {'/'.join(map(str, batch.lengths))} tokens, K = {steps}"
            differences.append(embedding_difference(name, what, ours, expected, expected_dtype(lm)).check(REFERENCE))
    return differences


def expected_dtype(lm: CausalLM) -> torch.dtype:
    return lm.head_weight.dtype


def warm_up(
    lm: CausalLM, todo: list[Point], batch: Batch, progress: tqdm
) -> tuple[list[Difference], dict[Point, int | None]]:
    """Each point once, untimed; its embeddings must agree with the reference's where the reference is among the
    points. -> differences, peak bytes above what was allocated before (CUDA only)."""
    expected: dict[int, Tensor] = {}
    differences, peaks = [], {}
    name = "the timed batch" if len(batch.lengths) > 1 else "the single text"
    for point in sorted(todo, key=lambda p: p.engine != REFERENCE):
        with _attached(lm, point.engine):
            before = _reset_peak(lm.device)
            ours = embed(lm, point.engine, batch, point.num_steps)
            peaks[point] = None if before is None else torch.cuda.max_memory_allocated(lm.device) - before
        if point.engine == REFERENCE:
            expected[point.num_steps] = ours
        elif point.num_steps in expected:
            what = f"{name}, K = {point.num_steps}"
            theirs = expected[point.num_steps]
            differences.append(
                embedding_difference(point.engine, what, ours, theirs, expected_dtype(lm)).check(REFERENCE)
            )
        progress.update()
    return differences, peaks


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
) -> tuple[list[Difference], list[dict[str, Any]]]:
    """-> differences on the timed batch, and one JSON object per point."""
    todo = points(engines, steps)
    runs, differences, peaks = _run(lm, todo, batch, repeats, "bench")
    timings = {point: Timing.of(found) for point, found in runs.items()}
    lengths = batch.lengths
    rows = []
    for point in todo:
        work = facts.inference(lengths, point.num_steps, shared_prefix=shared_prefix)
        at_zero = facts.inference(lengths, 0, shared_prefix=shared_prefix)
        row = point_row(point, timings, lengths, work, at_zero, ceilings)
        rows.append({**row, "peak_extra_bytes": peaks[point]})
    return differences, rows


def latency(
    lm: CausalLM, text: Batch, engines: list[str], steps: list[int], runs: int
) -> tuple[list[Difference], dict[Point, dict[str, float]]]:
    """One text at a time: what somebody who waits for a single embedding sees.

    Args:
        text: a batch of one row.
        steps: the K to measure.
        runs: of each point, interleaved, after one that is not counted.

    Returns:
        differences on that text; for each point `latency_p50` and `latency_p95` in seconds, percentiles over the runs
        (linear between two runs: of few runs the 95th is close to the slowest).
    """
    found, differences, _ = _run(lm, points(engines, steps), text, runs, "latency")
    return differences, {
        point: {
            "latency_p50": float(np.percentile(times, 50)),
            "latency_p95": float(np.percentile(times, 95)),
        }
        for point, times in found.items()
    }


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


def _run(
    lm: CausalLM, todo: list[Point], batch: Batch, repeats: int, title: str
) -> tuple[dict[Point, list[float]], list[Difference], dict[Point, int | None]]:
    """Warm-up, then every point in turn, `repeats` times. -> seconds of each run, differences, peak bytes."""
    runs: dict[Point, list[float]] = {point: [] for point in todo}
    with tqdm(total=len(todo) * (repeats + 1), desc=title, unit="run", disable=None, leave=False) as progress:
        differences, peaks = warm_up(lm, todo, batch, progress)
        for _ in range(repeats):
            for point in todo:
                with _attached(lm, point.engine):
                    run = partial(embed, lm, point.engine, batch, point.num_steps)
                    runs[point].append(seconds(run, lm.device))
                progress.update()
    return runs, differences, peaks


def _reset_peak(device: torch.device) -> int | None:
    """Bytes allocated now; None where the allocator does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
