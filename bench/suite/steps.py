"""One decode step as the engine captured it, soft token included, beside its floor and beside other ways to run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.agreement import relative_error
from bench.batches import random_batch
from bench.engines import real_tokens
from bench.suite.alternatives import Alternative, using
from bench.suite.model_cases import ModelCase
from bench.suite.session import Record, Session
from bench.timing import for_about
from bench.verdict import WrongResultError, verdict_of
from gircse.engine import Engine, EngineConfig
from gircse.engine.config import STEPS_BUCKET, kv_bytes_per_token
from gircse.lm.causal_lm import CausalLM
from gircse.ops.probe import tolerance_of
from gircse.roofline import ModelFacts

OURS, IN_TURN, STOCK = "fused decoder", "without dependent launch", "model's own decoder"
ONE_BY_ONE: Alternative = {"plan": {"DEPENDENT_LAUNCH": False}}
_SECONDS = 2.0  # of timing


def measure(session: Session, lm: CausalLM, case: ModelCase) -> Record:
    """Our decoder, the same without `plan.DEPENDENT_LAUNCH`, and the model's own."""
    ids, mask = random_batch(lm.vocabulary, [case.length] * case.rows, seed=0, device=session.device)
    rows, states, steps = real_tokens(ids, mask), {}, {}
    engines: list[Engine] = []  # a graph reads their buffers
    for name, alternative in ((OURS, {}), (IN_TURN, ONE_BY_ONE), (STOCK, {})):
        with using(alternative):
            engine = Engine(lm, _config(lm, case, "never" if name == STOCK else "auto"))
            states[name] = engine.states(rows, 1)  # captures the step
        steps[name] = _step(engine, case)
        engines.append(engine)
    with torch.inference_mode():
        found = for_about(steps, session.device, 0.1 if session.smoke else _SECONDS, fewest=3)
    seconds = {name: timing.seconds for name, timing in found.items()}
    ceilings, facts = session.ceilings(case.dtype), ModelFacts.of(lm.model)
    floor = ceilings.seconds([facts.vocabulary(case.rows), facts.body([case.length] * case.rows, 1)])
    reports = dict(zip(steps, (engine.report() for engine in engines), strict=True))
    return {
        "benchmark": "step",
        "case": case.name,
        "shape": case.shape,
        "batch": {"rows": case.rows, "length": case.length},
        "dtype": case.dtype,
        "ceilings": vars(ceilings),
        "floor_seconds": floor,
        "seconds": seconds,
        "launches": {name: [cost.launches for cost in report.steps] for name, report in reports.items()},
        "not_fused": reports[OURS].not_fused,
        "agreement": verdict_of(lambda: _agreement(states)),
        "lines": [_line(case, OURS, STOCK, floor, seconds), _line(case, "dependent launch", IN_TURN, floor, seconds)],
    }


def _config(lm: CausalLM, case: ModelCase, fused: str) -> EngineConfig:
    """Buffers for this batch and no more: several engines share the memory."""
    rows, slots = 1 << (case.rows - 1).bit_length(), case.length + STEPS_BUCKET + 64
    memory = rows * slots * kv_bytes_per_token(lm)
    return EngineConfig(fused_kernels=fused, max_rows=case.rows, kv_bytes=memory)


def _step(engine: Engine, case: ModelCase) -> Callable[[], None]:
    """A step of every row from the end of its prompt on, which two small writes bring back each time."""
    pool, state = engine._pool, engine._state
    assert pool is not None
    assert state is not None
    limits = engine._limits
    state, slots = state.first(limits.buffer_rows(case.rows)), limits.slots(case.length, 1)
    step = engine._runner.bind(engine._decoder, pool, state, slots, 1.0)

    def run() -> None:
        state.position.fill_(case.length)
        state.step.zero_()
        step()

    return run


def _agreement(states: dict[str, Tensor]) -> dict[str, Any]:
    """Of the first soft token's states with those of the model's own decoder."""
    errors = {name: relative_error(found, states[STOCK]) for name, found in states.items()}
    worst = max(errors.values())
    if not worst <= tolerance_of(states[STOCK].dtype):
        raise WrongResultError(f"states differ from the model's own: {errors}")
    return {"worst_error": worst}


def _line(case: ModelCase, what: str, baseline: str, floor: float, seconds: dict[str, float]) -> dict[str, Any]:
    ours, theirs = seconds[OURS], seconds[baseline]
    line = {"case": f"{case.name}, {what}", "floor": floor * 1e3, "ours": ours * 1e3, "baseline": theirs * 1e3}
    line |= {"speedup": theirs / ours, "over_floor": ours / floor, "milliseconds": ours * 1e3}
    (target,) = case.targets.values()
    return target.judge(line)
