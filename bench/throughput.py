"""Texts and tokens per second against K, each beside its floor; the latency of a single text.

The embeddings that were timed are kept: `bench.encode_check` says afterwards whether the speed may be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.batches import Batch
from bench.engines import ENGINES, SINGLE_PASS, Generation, Run
from bench.memory import peak_extra_bytes
from bench.points import Point, Trial, point_row, take_turns
from bench.timing import Timing, seconds
from gircse.lm.causal_lm import CausalLM
from gircse.ops import l2_normalize, pool_steps
from gircse.roofline import Ceilings, ModelFacts


def points(engines: list[str], steps: list[int]) -> list[Point]:
    """In the order in which they are timed. The single pass has one point, K = 0, whether or not 0 is among the
    steps."""
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
    """Times every engine at every K of the (ascending) `steps`; `interleave` and `most_seconds` as in `take_turns`."""
    timings: dict[Point, Timing] = {}
    lengths = batch.lengths
    at_zero = facts.inference(lengths, 0, shared_prefix=shared_prefix)
    turns = _turns(lm, points(engines, steps), batch, repeats, interleave=interleave, most_seconds=most_seconds)
    for trials in turns:
        timings |= {trial.point: Timing.of(trial.seconds) for trial in trials if trial.seconds}
        for trial in trials:
            if trial.failed is not None:
                yield Measured(trial.point, trial.failure, None)
                continue
            work = facts.inference(lengths, trial.point.num_steps, shared_prefix=shared_prefix)
            row = point_row(trial.point, timings, lengths, work, at_zero, ceilings)
            row |= {"peak_extra_bytes": trial.peak} | _step(lm, trial.point, len(lengths), max(lengths))
            yield Measured(trial.point, row, trial.result.cpu())


def _step(lm: CausalLM, point: Point, rows: int, longest: int) -> dict[str, int]:
    """Kernels and bytes of the captured step that a generation engine replayed for a batch; empty where it captured
    none."""
    run, positions = ENGINES[point.engine].run, longest + point.num_steps
    steps = run.engine(lm).report().steps if isinstance(run, Generation) and point.num_steps else []
    fitting = [step for step in steps if step.rows >= rows and step.slots >= positions]
    if not fitting:
        return {}
    least = min(fitting, key=lambda step: step.rows * step.slots)
    return {"step_launches": least.launches, "step_bytes": least.bytes}


def latency(lm: CausalLM, text: Batch, engines: list[str], steps: list[int], runs: int) -> Iterator[Measured]:
    """The time that somebody waits for a single embedding.

    Args:
        text: a batch of one row.
        steps: the K to measure.
        runs: of each point, in turns, after one that is not counted.

    Yields:
        rows with `latency_p50` and `latency_p95` in seconds alone, percentiles over the runs (linear between two runs,
        so that the 95th of few runs is close to the slowest); where a call raised, as in `measure`.
    """
    for trial in next(_turns(lm, points(engines, steps), text, runs, title="latency")):
        if trial.failed is not None:
            yield Measured(trial.point, trial.failure, None)
            continue
        row = {f"latency_p{p}": float(np.percentile(trial.seconds, p)) for p in (50, 95)}
        yield Measured(trial.point, row, trial.result.cpu())


def _turns(lm: CausalLM, todo: list[Point], batch: Batch, repeats: int, **settings: Any) -> Iterator[list[Trial]]:
    def one(trial: Trial, measured: Any) -> Any:
        def call() -> None:
            trial.result = embed(run, lm, batch, trial.point.num_steps)

        with ENGINES[trial.point.engine].attached(lm) as run:
            return measured(call, lm.device)

    def warm_up(trial: Trial) -> None:
        # On a CPU NumPy allocates the keys and values of the generation engine, which nothing counts.
        if lm.device.type == "cuda":
            trial.peak = one(trial, peak_extra_bytes)
        else:
            one(trial, seconds)

    return take_turns(todo, warm_up, lambda trial: one(trial, seconds), repeats, lm.device, **settings)


def generation_reports(lm: CausalLM, engines: list[str]) -> dict[str, dict[str, Any]]:
    """What each generation engine keeps in memory, the graphs that it captured, and why it captured none."""
    runs = {name: ENGINES[name].run for name in engines}
    return {name: run.report(lm) for name, run in runs.items() if isinstance(run, Generation)}
