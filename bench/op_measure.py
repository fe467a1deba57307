"""One case of `bench.cases` from tensors to record: time engine beside engine, memory, then whether the results agree.

The clocks come first, so that a result that is wrong, or that could not be checked, still shows what it costs; the
record says so in `agreement`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.memory import give_back, peak_extra_bytes
from bench.op_engines import ENGINE_NAMES, Op, Problem, check, compiled, eager, ours, product
from bench.timing import Timing, captured, enqueue_seconds, for_about
from bench.verdict import first_line, verdict_of
from gircse.roofline import Ceilings

_OUT_OF_MEMORY = "out of memory"
_FEWEST = 3
_PRODUCT = "product"  # `hidden @ head.T` alone, in cases that are held to it
_REPLAYED = ("eager", "ours", _PRODUCT)
# Above so many rows no graph is captured: launching is nothing beside the rest, and a graph holds its memory twice.
_LAUNCHES_MATTER = 4096


def measure(
    case: Case,
    head: Tensor,
    embed: Tensor | None,
    ceilings: Ceilings,
    *,
    compile_backend: str | None = "inductor",
    budget: float = 1.0,
) -> dict[str, Any]:
    """All engines interleaved, for about `budget` seconds (at least 3 runs of each). On CUDA eager and ours run as CUDA
    graphs too, and the comparisons take these: a graph costs one launch, so that the host has no part in it.

    Args:
        compile_backend: of `torch.compile`; None leaves that engine out.

    Eager is null in the record where it runs out of memory, `torch.compile` also where it fails otherwise.
    """
    device, problem = head.device, Problem.draw(case.rows, case.what, head, embed, case.variant)
    ops: dict[str, Op] = {"eager": eager, "ours": ours}
    if compile_backend is not None:
        ops["compiled"] = compiled(compile_backend)
    runs = {name: problem.call(ops[name]) for name in ENGINE_NAMES if name in ops}
    if case.target.over_product is not None:
        runs[_PRODUCT] = problem.call(product)
    reasons = {name: _warm_up(run, name, device) for name, run in runs.items()}
    failures = {name: why for name, why in reasons.items() if why is not None}
    runs = {name: run for name, run in runs.items() if name not in failures}
    peaks = {name: peak_extra_bytes(run, device) for name, run in runs.items()}
    host: dict[str, float] = {}
    graphs, kept, why = {}, [], {}
    if device.type == "cuda" and case.rows <= _LAUNCHES_MATTER:
        host = {name: enqueue_seconds(run, device, 10) * 1e6 for name, run in runs.items()}
        graphs, kept, why = _captured(runs, device)
    timed = {**runs, **{f"{name} replayed": run for name, run in graphs.items()}}
    timings = for_about(timed, device, budget, fewest=_FEWEST)
    replayed = {name: timings.pop(f"{name} replayed") for name in graphs}
    for keeper in (timed, graphs, kept):  # the comparison needs their memory
        keeper.clear()
    replay = {
        "milliseconds": {name: timing.seconds * 1e3 for name, timing in replayed.items()},
        "why": why,
        "host_microseconds": host,
    }
    return {
        "benchmark": "op",
        "case": case.name,
        "model": case.model,
        **case.matrices._asdict(),
        "rows": case.rows,
        "pass": case.what,
        "dtype": case.dtype,
        "device": device.type,
        "repeats": len(timings["ours"].runs),
        "engines": {
            **dict.fromkeys(ENGINE_NAMES),
            **{name: _engine(timings[name], peaks[name]) for name in runs},
        },
        "failures": failures,
        **_comparisons(timings, replayed, peaks, case.floor(ceilings)),
        "replay": replay if device.type == "cuda" else None,
        "agreement": verdict_of(lambda: check(problem)),
        "ceilings": vars(ceilings),
    }


def judge(record: dict[str, Any], case: Case) -> dict[str, Any]:
    """The record with its target, and with the line that the suite's table shows."""
    keys = ("speedup", "over_floor", "plain_speedup", "memory_ratio", "extra_bytes", "over_product")
    line = case.target.judge(
        {
            "case": case.name,
            "floor": record["floor_milliseconds"],
            "ours": record["milliseconds"],
            "baseline": record["eager_milliseconds"],
            **{key: record.get(key) for key in keys},
        }
    )
    asked = {name: bound for name, bound in case.target._asdict().items() if bound is not None}
    return {**record, "targets": asked, **{key: line[key] for key in ("target", "misses", "met")}, "lines": [line]}


def _engine(timing: Timing, peak: int) -> dict[str, Any]:
    return {"milliseconds": timing.seconds * 1e3, "spread": timing.spread, "peak_extra_bytes": peak}


def _comparisons(
    timings: dict[str, Timing], replayed: dict[str, Timing], peaks: dict[str, int], floor: float
) -> dict[str, Any]:
    """Ours against floor and eager: both as graphs where both could be captured, else both as plain calls."""
    plain = {name: timing.seconds for name, timing in timings.items()}
    pair = {name: timing.seconds for name, timing in replayed.items()}
    if "ours" not in pair or ("eager" in plain and "eager" not in pair):
        pair = plain
    mine, theirs = pair["ours"], pair.get("eager")
    return {
        "milliseconds": mine * 1e3,
        "eager_milliseconds": theirs and theirs * 1e3,
        "floor_milliseconds": floor * 1e3,
        "over_floor": mine / floor,
        "speedup": theirs and theirs / mine,
        "plain_speedup": plain["eager"] / plain["ours"] if "eager" in plain else None,
        "extra_bytes": peaks["ours"],
        "memory_ratio": peaks["ours"] / peaks["eager"] if peaks.get("eager") else None,
        "over_product": mine / pair[_PRODUCT] if _PRODUCT in pair else None,
    }


def _warm_up(run: Callable[[], Any], name: str, device: torch.device) -> str | None:
    """Three runs. -> why there is nothing to measure: another engine's lack of memory, a failed compilation. An error
    of ours is raised, after one more try with all the memory that PyTorch keeps for later."""
    for last in (False, True):
        try:
            for _ in range(3):
                run()
            return None
        except Exception as error:
            full = is_out_of_memory(error)
            if name == "compiled" and not full:
                return first_line(error)
            if full and last and name != "ours":
                return _OUT_OF_MEMORY
            if last or not full:
                raise
        give_back(device)  # outside `except`: the traceback would keep tensors alive
    return None


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _captured(
    runs: dict[str, Callable[[], Any]], device: torch.device
) -> tuple[dict[str, Callable[[], Any]], list[Any], dict[str, str]]:
    """-> replays of eager and ours as CUDA graphs, what must be kept alive while they are replayed, and why one of
    them could not be captured."""
    replays: dict[str, Callable[[], Any]] = {}
    kept: list[Any] = []
    why: dict[str, str] = {}
    for name in [name for name in _REPLAYED if name in runs]:
        try:
            replays[name], alive = captured(runs[name], device)
        except RuntimeError as error:  # noqa: PERF203, not capturable or no memory: the case goes on with plain calls
            why[name] = first_line(error)
        else:
            kept.append(alive)
    return replays, kept, why
