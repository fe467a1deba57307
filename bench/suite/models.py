"""Encoding and training steps of whole models, timed on random weights that are made once for each shape.

The clocks come first. Then the embeddings, losses and gradients are compared (`bench.encode_check`,
`bench.train_check`), once for all cases of a shape, because a float32 copy of the model is made for it. A record is
written as soon as its case has been timed, as not checked, and again when it has been.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from bench import encode_check, throughput, train_check, training
from bench.agreement import OK, UNCHECKED, WRONG, Difference, reason
from bench.batches import FIXED, Batch, random_batch
from bench.cases import Target
from bench.engines import CACHED, ENGINES, GRAPH, OFFICIAL_EVAL, REFERENCE, forget
from bench.memory import give_back
from bench.records import judged, problems, settings
from bench.shapes import SHAPES, random_model
from bench.suite.model_cases import (
    ENCODINGS,
    SMOKE_ENCODINGS,
    SMOKE_TRAINING,
    TRAINING,
    Encoding,
    ModelCase,
    TrainStep,
)
from bench.suite.profile import profile
from bench.suite.session import Record, Session, say
from bench.suite.summary import shown
from gircse.lm.causal_lm import CausalLM
from gircse.roofline import ModelFacts

_REPEATS, _SECONDS = 7, 2.0  # a point is run so often, or until it has taken so long
_CHECKED_LENGTH = 48  # tokens of the rows on which engines are compared
_NOT_YET = "its results are compared when all encodings of its shape have been timed"


def run(session: Session, sections: Sequence[str], *, profiled: bool) -> None:
    """One shape after the other: its encodings, then its training step, which puts LoRA on the same weights."""
    encodings = (SMOKE_ENCODINGS if session.smoke else ENCODINGS) if "engine" in sections else []
    steps = (SMOKE_TRAINING if session.smoke else TRAINING) if "training" in sections else []
    for shape in dict.fromkeys(case.shape for case in (*encodings, *steps)):
        weights = _Weights(session)
        with session.surviving(f"encode-{shape}"):
            _encode_all(session, weights, [case for case in encodings if case.shape == shape], profiled=profiled)
        weights.end_of_encoding()
        for case in (case for case in steps if case.shape == shape):
            if not _finished(session, case, profiled=profiled) and session.fits(case.name, case.seconds):
                with session.surviving(case.name):
                    _train(session, weights, case, profiled=profiled)
        del weights
        give_back(session.device)


class _Weights:
    """The model of one shape, made when it is first needed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._base: Any = None
        self.lm: CausalLM | None = None

    def base(self, case: ModelCase) -> Any:
        if self._base is None:
            config = SHAPES[case.shape].config(case.layers)
            self._base = random_model(config, dtype=case.torch_dtype, device=self._session.device)
        return self._base

    def encoder(self, case: Encoding) -> CausalLM:
        if self.lm is None:
            self.lm = CausalLM.from_model(self.base(case))
        return self.lm

    def end_of_encoding(self) -> None:
        """The engine gives its buffers back: they take most of the memory, which training needs."""
        self.lm = None
        forget([GRAPH])
        give_back(self._session.device)


def _finished(session: Session, case: ModelCase, *, profiled: bool) -> bool:
    """A case whose profile is asked for and not there is measured again."""
    found = session.finished(case.name)
    if profiled and not list(session.folder.glob(f"profile-*{case.name}.txt")):
        found = None
    if found is not None:
        session.records.append(found)
    return found is not None


def _encode_all(session: Session, weights: _Weights, cases: list[Encoding], *, profiled: bool) -> None:
    waiting: list[tuple[Encoding, Record, encode_check.Timed]] = []
    for case in cases:
        if _finished(session, case, profiled=profiled) or not session.fits(case.name, case.seconds):
            continue
        started = time.perf_counter()
        with session.surviving(case.name):
            record, timed = _encoding(session, weights.encoder(case), case)
            session.save(case.name, _with_lines(case, record, [], _NOT_YET, GRAPH, OFFICIAL_EVAL))
            waiting.append((case, record, timed))
            if profiled:
                _profile_encoding(session, weights.encoder(case), case, timed.batch)
            say(f"timed: {case.name} ({time.perf_counter() - started:.1f} s)")
    if not waiting:
        return
    checks, why = [], None
    name = f"checks-{cases[0].shape}"
    try:
        if name in session.left_out:
            raise RuntimeError("the comparison was lost in an earlier attempt")
        engines, most = [OFFICIAL_EVAL, GRAPH], max(max(case.targets) for case, _, _ in waiting)
        length = min(_CHECKED_LENGTH, max(case.length for case, _, _ in waiting))
        lm = weights.encoder(cases[0])
        with session.watched(name, sum(case.seconds for case, _, _ in waiting)):
            checks = encode_check.check(lm, engines, most, length, seed=0, timed=[timed for _, _, timed in waiting])
    except Exception as error:  # no memory for the float32 copy, say: the figures stay, marked
        why = reason(error)
    names = {timed.name for _, _, timed in waiting}
    for case, record, timed in waiting:
        others = tuple(f"{name}," for name in names - {timed.name})
        own = [check for check in checks if not check.what.startswith(others)]
        _keep(session, case, _with_lines(case, record, own, why, GRAPH, OFFICIAL_EVAL))


def _encoding(session: Session, lm: CausalLM, case: Encoding) -> tuple[Record, encode_check.Timed]:
    vocab, facts = lm.embed_weight.shape[0], ModelFacts.of(lm.model)
    batch = random_batch(vocab, [case.length] * case.batch, seed=0, device=session.device)
    engines = [*([OFFICIAL_EVAL] if case.baseline else []), GRAPH]
    ceilings, steps = session.ceilings(case.dtype), sorted(case.targets)
    points = list(
        throughput.measure(
            lm, facts, ceilings, batch, engines, steps, _REPEATS, interleave=False, most_seconds=_SECONDS
        )
    )
    record = {
        "benchmark": "throughput",
        "case": case.name,
        **settings(_options(session, case, engines, case.batch), lm.config, facts, batch.lengths),
        "latency_runs": 0,
        "generation": _generation(lm, engines),
        "ceilings": vars(ceilings),
        "rows": [point.row for point in points],
    }
    record["batch"]["shared_prefix"] = 0
    return record, encode_check.Timed(case.name, batch, points)


def _generation(lm: CausalLM, engines: list[str]) -> Record:
    """Nothing where the engine cannot even be made: its points say why, and the baseline's stay."""
    try:
        return throughput.generation_reports(lm, engines)
    except Exception:
        return {}


def _profile_encoding(session: Session, lm: CausalLM, case: Encoding, batch: Batch) -> None:
    for what, k in (("prefill", 0), ("decode", max(case.targets))):
        if not session.fits(f"profile-{what}-{case.name}", 1.0):
            continue
        with session.surviving(f"profile-{what}-{case.name}"), ENGINES[GRAPH].attached(lm) as engine:
            text = profile(
                f"{case.name}: {what}, K = {k}",
                lambda engine=engine, k=k: throughput.embed(engine, lm, batch, k),
                session.device,
                steps=k or 1,
            )
            session.write(f"profile-{what}-{case.name}.txt", text)


def _train(session: Session, weights: _Weights, case: TrainStep, *, profiled: bool) -> None:
    steps, engines = sorted(case.targets), [REFERENCE, CACHED]
    job = training.TrainJob(
        shape=case.shape,
        model=None,
        layers=case.layers,
        queries=case.queries,
        negatives=1,
        length=case.length,
        distribution=FIXED,
        num_steps=steps[-1],
        dtype=case.dtype,
        device=str(session.device),
        seed=0,
        checkpointing=(REFERENCE,),
    )
    base = weights.base(case)
    facts = ModelFacts.of(base)  # of the model as it is published, before LoRA is put into it
    lm = training.trainable(job, base)
    runners, ceilings = training.here(lm, job, engines), session.ceilings(case.dtype)
    rows = list(training.measure(runners, job, facts, ceilings, steps, _REPEATS, most_seconds=_SECONDS))
    record = {
        "benchmark": "training",
        "case": case.name,
        **settings(_options(session, case, engines, case.queries), lm.config, facts, job.lengths()),
        "checkpointing": [REFERENCE],
        "ceilings": vars(ceilings),
        "rows": rows,
    }
    record["batch"] |= {"queries": job.queries, "negatives": job.negatives}
    session.save(case.name, _with_lines(case, record, [], _NOT_YET, CACHED, REFERENCE))
    if profiled and session.fits(f"profile-{case.name}", 1.0):
        ours = runners[engines.index(CACHED)]
        with session.surviving(f"profile-{case.name}"):
            text = profile(
                f"{case.name}: a training step, K = {steps[-1]}", lambda: ours.step(steps[-1]), session.device
            )
            session.write(f"profile-{case.name}.txt", text)
    checks, why = [], None
    try:
        checks = train_check.check(job, engines, lm, runners)
    except Exception as error:
        why = reason(error)
    _keep(session, case, _with_lines(case, record, checks, why, CACHED, REFERENCE))


def _keep(session: Session, case: ModelCase, record: Record) -> None:
    session.keep(case.name, record)
    for line in problems({**record, "agreement": {"checks": []}}):  # points that could not be timed
        session.problem(f"{case.name}: {line}")
    for name, kept in record.get("generation", {}).items():
        if kept["not_captured"] is not None:
            session.problem(f"{case.name}: {name} ran its step eagerly: {kept['not_captured']}")
    say(shown(record))


def _options(session: Session, case: ModelCase, engines: list[str], batch: int) -> Namespace:
    """As `bench/run.py` would have them."""
    return Namespace(
        name=case.shape,
        model=None,
        layers=case.layers,
        dtype=case.dtype,
        device=str(session.device),
        batch=batch,
        length=case.length,
        distribution=FIXED,
        seed=0,
        engines=engines,
        steps=sorted(case.targets),
        repeats=_REPEATS,
    )


def _with_lines(
    case: ModelCase,
    record: Record,
    checks: Sequence[Difference],
    why: str | None,
    ours: str,
    baseline: str,
) -> Record:
    """The record with its verdict and a line for each K; `why`: nothing could be compared."""
    found = {key: value for key, value in record.items() if key != "rows"}
    found |= judged([dict(row) for row in record["rows"]], list(checks))
    bad = [check for check in checks if check.verdict != OK]
    verdict = OK if not bad and why is None else WRONG if any(check.verdict == WRONG for check in bad) else UNCHECKED
    found["agreement"] |= {"verdict": verdict, "why": why or "; ".join(check.describe(REFERENCE) for check in bad[:3])}
    points = {(point["engine"], point["num_steps"]): point for point in found["points"]}
    found["lines"] = [
        _line(f"{case.name}, K = {k}", target, points.get((ours, k)), points.get((baseline, k)))
        for k, target in case.targets.items()
    ]
    return found


def _line(name: str, target: Target, ours: Record | None, baseline: Record | None) -> dict[str, Any]:
    """What could not be timed has met nothing."""
    theirs = baseline["seconds"] if baseline else None
    if ours is None:
        line = target.judge({"case": name, "floor": None, "ours": None, "baseline": theirs and theirs * 1e3})
        return {**line, "met": None if line["met"] is None else False}
    mine = ours["seconds"]
    return target.judge(
        {
            "case": name,
            "floor": ours["floor_seconds"] * 1e3,
            "ours": mine * 1e3,
            "milliseconds": mine * 1e3,
            "baseline": theirs and theirs * 1e3,
            "speedup": theirs and theirs / mine,
            "over_floor": ours["time_over_floor"],
            "over_zero": ours.get("time_over_zero"),
        }
    )
