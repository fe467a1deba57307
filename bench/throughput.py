"""Texts and tokens per second against K: agreement first, then interleaved timings, each beside its floor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.agreement import Difference, embedding_difference
from bench.batches import Batch, check_lengths, random_batch
from bench.engines import ENGINES, REFERENCE, SINGLE_PASS
from bench.floors import Ceilings, ModelFacts
from bench.timing import Timing, seconds
from gircse.architecture import CausalLM
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


def check_agreement(lm: CausalLM, engines: list[str], num_steps: int, length: int, *, seed: int) -> list[Difference]:
    """Every engine against the reference on four rows, two of them padded, at the largest K and at K = 0.

    Raises:
        Disagreement: with the measured difference.
    """
    batch = random_batch(lm.embed_weight.shape[0], check_lengths(length), seed=seed + 1, device=lm.device)
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
    for point in sorted(todo, key=lambda p: p.engine != REFERENCE):
        with _attached(lm, point.engine):
            before = _reset_peak(lm.device)
            ours = embed(lm, point.engine, batch, point.num_steps)
            peaks[point] = None if before is None else torch.cuda.max_memory_allocated(lm.device) - before
        if point.engine == REFERENCE:
            expected[point.num_steps] = ours
        elif point.num_steps in expected:
            what = f"the timed batch, K = {point.num_steps}"
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
) -> tuple[list[Difference], list[dict[str, Any]]]:
    """-> differences on the timed batch, and one JSON object per point."""
    todo = points(engines, steps)
    runs: dict[Point, list[float]] = {point: [] for point in todo}
    with tqdm(total=len(todo) * (repeats + 1), desc="bench", unit="run", disable=None, leave=False) as progress:
        differences, peaks = warm_up(lm, todo, batch, progress)
        for _ in range(repeats):
            for point in todo:
                with _attached(lm, point.engine):
                    run = partial(embed, lm, point.engine, batch, point.num_steps)
                    runs[point].append(seconds(run, lm.device))
                progress.update()
    timings = {point: Timing.of(found) for point, found in runs.items()}
    return differences, [_row(point, timings, peaks[point], facts, ceilings, batch) for point in todo]


def _row(
    point: Point,
    timings: dict[Point, Timing],
    peak: int | None,
    facts: ModelFacts,
    ceilings: Ceilings,
    batch: Batch,
) -> dict[str, Any]:
    timing, lengths = timings[point], batch.lengths
    texts, tokens = len(lengths), sum(lengths) + point.num_steps * len(lengths)
    work = facts.inference(lengths, point.num_steps)
    floor = ceilings.seconds(work)

    def speedup_over(other: Point) -> float | None:
        return timings[other].seconds / timing.seconds if other in timings else None

    return {
        "engine": point.engine,
        "num_steps": point.num_steps,
        "seconds": timing.seconds,
        "spread": timing.spread,
        "runs": timing.runs,
        "texts_per_second": texts / timing.seconds,
        "tokens_per_second": tokens / timing.seconds,
        "speedup_over_recompute": speedup_over(Point(REFERENCE, point.num_steps)),
        "texts_ratio_to_single_pass": speedup_over(Point(SINGLE_PASS, 0)),
        "flops": sum(phase.flops for phase in work),
        "bytes": sum(phase.bytes for phase in work),
        "floor_seconds": floor,
        "time_over_floor": timing.seconds / floor,
        "peak_extra_bytes": peak,
    }


def _reset_peak(device: torch.device) -> int | None:
    """Bytes allocated now; None where the allocator does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
