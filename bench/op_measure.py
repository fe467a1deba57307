"""One case of `bench.cases` from tensors to record: correctness, then memory, then time, engine beside engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.memory import give_back, peak_extra_bytes
from bench.op_engines import ENGINE_NAMES, Op, Problem, check, compiled, eager, ours
from bench.timing import Timing, enqueue_seconds, interleaved, seconds
from gircse.floors import Ceilings

_OUT_OF_MEMORY = "out of memory"
_FEWEST, _MOST = 5, 50


def measure(
    case: Case,
    head: Tensor,
    embed: Tensor | None,
    ceilings: Ceilings,
    *,
    compile_backend: str = "inductor",
    budget: float = 2.0,
) -> dict[str, Any]:
    """All engines interleaved, for about `budget` seconds (at least 5 runs of each).

    Eager is null in the record where it runs out of memory, `torch.compile` also where it fails otherwise.

    Raises:
        WrongResultError: before any clock has been read.
    """
    device = head.device
    problem = Problem.draw(case.rows, case.what, head, embed)
    agreement = check(problem)
    give_back(device)  # its float64 copies: an allocator that has to make room later does so in somebody's time
    ops: dict[str, Op] = {"eager": eager, "compiled": compiled(compile_backend), "ours": ours}
    runs = {name: problem.call(ops[name]) for name in ENGINE_NAMES}
    failures: dict[str, str] = {}
    for name in ENGINE_NAMES:
        failure = _warm_up(runs[name], name)
        if failure is not None:
            failures[name] = failure
            del runs[name]
            give_back(device)
    peaks = {name: peak_extra_bytes(run, device) for name, run in runs.items()}
    once = sum(seconds(run, device) for run in runs.values())
    repeats = max(_FEWEST, min(_MOST, int(budget / max(once, 1e-6))))
    timings = interleaved(runs, device, repeats)
    return {
        "benchmark": "op",
        "case": case.name,
        "model": case.model,
        **case.matrices._asdict(),
        "rows": case.rows,
        "pass": case.what,
        "dtype": case.dtype,
        "device": device.type,
        "repeats": repeats,
        "engines": {name: _engine(timings[name], peaks[name]) if name in runs else None for name in ENGINE_NAMES},
        "failures": failures,
        **_comparisons(timings, peaks, case.floor(ceilings)),
        "replay": _replay(runs, device) if device.type == "cuda" and case.decodes else None,
        "check": agreement,
        "compile_backend": compile_backend,
        "ceilings": vars(ceilings),
    }


def judge(record: dict[str, Any], case: Case) -> dict[str, Any]:
    """The record with its target and whether it is met (None: there is none)."""
    misses = case.target.misses(record)
    asked = {name: bound for name, bound in case.target._asdict().items() if bound is not None}
    verdict = {"targets": asked, "target": str(case.target), "misses": misses, "met": not misses if asked else None}
    return {**record, **verdict}


def _engine(timing: Timing, peak: int) -> dict[str, Any]:
    return {"milliseconds": timing.seconds * 1e3, "spread": timing.spread, "peak_extra_bytes": peak}


def _comparisons(timings: dict[str, Timing], peaks: dict[str, int], floor: float) -> dict[str, Any]:
    mine = timings["ours"].seconds
    speedups = {name: timing.seconds / mine for name, timing in timings.items() if name != "ours"}
    return {
        "floor_milliseconds": floor * 1e3,
        "over_floor": mine / floor,
        "speedup_over_eager": speedups.get("eager"),
        "speedup_over_compiled": speedups.get("compiled"),
        "speedup_over_best": min(speedups.values(), default=None),
        "extra_bytes": peaks["ours"],
        "memory_ratio": peaks["ours"] / peaks["eager"] if peaks.get("eager") else None,
    }


def _warm_up(run: Callable[[], Any], name: str) -> str | None:
    """Three runs. -> why there is nothing to measure: another engine's lack of memory, a failed compilation. What goes
    wrong with ours is raised."""
    try:
        for _ in range(3):
            run()
    except Exception as error:
        if name == "ours":
            raise
        if is_out_of_memory(error):
            return _OUT_OF_MEMORY
        if name == "eager":
            raise
        return first_line(error)
    return None


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """Type and first line of the message, for a table's cell."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _replay(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    """Ours as a CUDA graph, which costs one launch, and the host's time to launch each engine: what a step is without
    Python, and how much of it Python is."""
    host = {name: enqueue_seconds(run, device) * 1e6 for name, run in runs.items()}
    try:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # capture wants its libraries warm on a stream that is not the default one
            runs["ours"]()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph):
            kept = runs["ours"]()
        graph.replay()
        timing = interleaved({"ours": graph.replay}, device, _MOST)["ours"]
        del kept
    except RuntimeError as error:  # not capturable: a finding, not the end of the benchmark
        return {"milliseconds": None, "why": first_line(error), "host_microseconds": host}
    return {"milliseconds": timing.seconds * 1e3, "spread": timing.spread, "host_microseconds": host}
