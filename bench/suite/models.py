"""Encoding, decode steps and training steps of whole models, timed on random weights that are made once for each shape.

The clocks come first. Then the embeddings, losses and gradients are compared (`bench.encode_check`,
`bench.train_check`), once for all encodings of a shape, because a float32 copy of the model is made for it. A record is
written as soon as its case has been timed, as not checked, and again when it has been.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from bench import encode_check, throughput, train_check, training
from bench.agreement import OK, UNCHECKED, WRONG, Difference, reason
from bench.batches import FIXED, random_batch
from bench.cases import Target
from bench.engines import CACHED, ENGINES, GRAPH, OFFICIAL_EVAL, REFERENCE, forget
from bench.memory import give_back
from bench.records import judged, problems, settings
from bench.shapes import SHAPES, random_model
from bench.suite import steps, train_steps
from bench.suite.model_cases import MODEL_CASES, SMOKE_MODEL_CASES, ModelCase
from bench.suite.profile import profile
from bench.suite.session import Record, Session, say
from bench.suite.summary import shown
from gircse.lm.causal_lm import CausalLM
from gircse.roofline import ModelFacts

_REPEATS, _SECONDS = 7, 2.0  # a point is run so often, or until it has taken so long
_CHECKED_LENGTH = 48  # tokens of the rows on which engines are compared
_NOT_YET = "its results are compared when all encodings of its shape have been timed"
_ENGINES = {"engine": (GRAPH, OFFICIAL_EVAL), "training": (CACHED, REFERENCE)}  # ours and the baseline


def run(session: Session, sections: Sequence[str], *, profiled: bool) -> None:
    """One shape after the other: its encodings and decode steps, then its training step, which puts LoRA on the same
    weights."""
    cases = [case for case in (SMOKE_MODEL_CASES if session.smoke else MODEL_CASES) if case.section in sections]
    for shape in dict.fromkeys(case.shape for case in cases):
        todo = [case for case in cases if case.shape == shape and not _finished(session, case, profiled)]
        weights = _Weights(session)
        with session.surviving(f"encode-{shape}"):
            _encode(session, weights, [case for case in todo if case.section == "engine"], profiled)
        for case in (case for case in todo if case.section == "step"):
            _step(session, weights, case)
        weights.end_of_encoding()
        for case in (case for case in todo if case.section == "train"):
            session.measure(case.name, case.seconds, lambda case=case: train_steps.measure(session, case))
            give_back(session.device)
        for case in (case for case in todo if case.section == "training"):
            if session.fits(case.name, case.seconds):
                with session.surviving(case.name):
                    _train(session, weights.base(case), case, profiled)
        del weights
        give_back(session.device)


class _Weights:
    """The model of one shape, made when it is first needed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._base: Any = None
        self._lm: CausalLM | None = None

    def base(self, case: ModelCase) -> Any:
        if self._base is None:
            config = SHAPES[case.shape].config(case.layers)
            self._base = random_model(config, dtype=case.torch_dtype, device=self._session.device)
        return self._base

    def encoder(self, case: ModelCase) -> CausalLM:
        if self._lm is None:
            self._lm = CausalLM.from_model(self.base(case))
        return self._lm

    def end_of_encoding(self) -> None:
        """The engine gives its buffers back: they take most of the memory, which training needs."""
        self._lm = None
        forget([GRAPH])
        give_back(self._session.device)


def _finished(session: Session, case: ModelCase, profiled: bool) -> bool:
    """A case whose profile is asked for and not there is measured again."""
    missing = (
        profiled
        and case.section not in ("step", "train")
        and not list(session.folder.glob(f"profile-*{case.name}.txt"))
    )
    return not missing and session.had(case.name)


def _encode(session: Session, weights: _Weights, cases: list[ModelCase], profiled: bool) -> None:
    waiting: list[tuple[ModelCase, Record, encode_check.Timed]] = []
    for case in (case for case in cases if session.fits(case.name, case.seconds)):
        with session.surviving(case.name):
            lm = weights.encoder(case)
            record, timed = _encoding(session, lm, case)
            session.save(case.name, _complete(case, record, [], _NOT_YET))
            waiting.append((case, record, timed))
            for what, k in (("prefill", 0), ("decode", max(case.targets))) if profiled else ():
                with ENGINES[GRAPH].attached(lm) as engine:

                    def embed(engine: Any = engine, k: int = k) -> Any:
                        return throughput.embed(engine, lm, timed.batch, k)  # noqa: B023

                    _profile(session, f"{what}-{case.name}", f"{what}, K = {k}", embed, steps=k or 1)
            say(f"timed: {case.name}")
    if not waiting:
        return
    name = f"checks-{cases[0].shape}"

    def check() -> list[Difference]:
        if name in session.left_out:
            raise RuntimeError("the comparison was lost in an earlier attempt")
        most = max(max(case.targets) for case, _, _ in waiting)
        length = min(_CHECKED_LENGTH, max(case.length for case, _, _ in waiting))
        lm, everything = weights.encoder(cases[0]), [timed for _, _, timed in waiting]
        with session.watched(name, sum(case.seconds for case, _, _ in waiting)):
            return encode_check.check(lm, [OFFICIAL_EVAL, GRAPH], most, length, seed=0, timed=everything)

    checks, why = _checked(check)
    names = {timed.name for _, _, timed in waiting}
    for case, record, timed in waiting:
        others = tuple(f"{name}," for name in names - {timed.name})
        own = [check for check in checks if not check.what.startswith(others)]
        _keep(session, case, _complete(case, record, own, why))


def _encoding(session: Session, lm: CausalLM, case: ModelCase) -> tuple[Record, encode_check.Timed]:
    facts, ceilings = ModelFacts.of(lm.model), session.ceilings(case.dtype)
    batch = random_batch(lm.embed_weight.shape[0], [case.length] * case.rows, seed=0, device=session.device)
    engines = [*([OFFICIAL_EVAL] if case.baseline else []), GRAPH]
    limits: dict[str, Any] = {"interleave": False, "most_seconds": _SECONDS}
    points = list(throughput.measure(lm, facts, ceilings, batch, engines, sorted(case.targets), _REPEATS, **limits))
    try:
        generation = throughput.generation_reports(lm, engines)
    except Exception:  # the engine cannot even be made: its points say why, and the baseline's stay
        generation = {}
    record = {
        "case": case.name,
        **settings("throughput", _options(session, case, engines), lm.config, facts, batch.lengths),
        "latency_runs": 0,
        "generation": generation,
        "ceilings": vars(ceilings),
        "rows": [point.row for point in points],
    }
    record["batch"]["shared_prefix"] = 0
    return record, encode_check.Timed(case.name, batch, points)


def _step(session: Session, weights: _Weights, case: ModelCase) -> None:
    session.measure(case.name, case.seconds, lambda: steps.measure(session, weights.encoder(case), case))


def _train(session: Session, base: Any, case: ModelCase, profiled: bool) -> None:
    steps, engines = sorted(case.targets), [REFERENCE, CACHED]
    job = training.TrainJob(
        queries=case.rows,
        negatives=1,
        length=case.length,
        distribution=FIXED,
        num_steps=steps[-1],
        dtype=case.dtype,
        device=str(session.device),
        seed=0,
        checkpointing=(REFERENCE,),
    )
    facts = ModelFacts.of(base)  # of the model as it is published, before LoRA is put into it
    lm = training.trainable(job, base)
    runners, ceilings = training.here(lm, job, engines), session.ceilings(case.dtype)
    rows = list(training.measure(runners, job, facts, ceilings, steps, _REPEATS, most_seconds=_SECONDS))
    record = {
        "case": case.name,
        **settings("training", _options(session, case, engines), lm.config, facts, job.lengths()),
        "checkpointing": [REFERENCE],
        "ceilings": vars(ceilings),
        "rows": rows,
    }
    record["batch"] |= {"queries": job.queries, "negatives": job.negatives}
    session.save(case.name, _complete(case, record, [], _NOT_YET))
    if profiled:
        ours = runners[engines.index(CACHED)]
        _profile(session, case.name, f"a training step, K = {steps[-1]}", lambda: ours.step(steps[-1]))
    checks, why = _checked(lambda: train_check.check(job, engines, lm, runners))
    _keep(session, case, _complete(case, record, checks, why))


def _checked(check: Callable[[], list[Difference]]) -> tuple[list[Difference], str | None]:
    """What was compared, or why nothing was: without memory for the float32 copy the figures stay, marked."""
    try:
        return check(), None
    except Exception as error:
        return [], reason(error)


def _profile(session: Session, name: str, what: str, run: Callable[[], Any], *, steps: int = 1) -> None:
    name = f"profile-{name}"
    if session.fits(name, 1.0):
        with session.surviving(name):
            session.write(f"{name}.txt", profile(f"{name}: {what}", run, session.device, steps=steps))


def _keep(session: Session, case: ModelCase, record: Record) -> None:
    session.keep(case.name, record)
    for line in problems({**record, "agreement": {"checks": []}}):  # points that could not be timed
        session.problem(f"{case.name}: {line}")
    for name, kept in record.get("generation", {}).items():
        if kept["not_captured"] is not None:
            session.problem(f"{case.name}: {name} ran its step eagerly: {kept['not_captured']}")
        if kept["not_fused"] is not None:
            session.problem(f"{case.name}: {name} ran the model's own decoder: {kept['not_fused']}")
    say(shown(record))


def _options(session: Session, case: ModelCase, engines: list[str]) -> Namespace:
    """As `bench/run.py` would have them."""
    return Namespace(
        name=case.shape,
        model=None,
        layers=case.layers,
        dtype=case.dtype,
        device=str(session.device),
        batch=case.rows,
        length=case.length,
        distribution=FIXED,
        seed=0,
        engines=engines,
        steps=sorted(case.targets),
        repeats=_REPEATS,
    )


def _complete(case: ModelCase, record: Record, checks: list[Difference], why: str | None) -> Record:
    """The record with its verdict and a line for each K; `why`: nothing could be compared."""
    record = {**record, **judged([dict(row) for row in record["rows"]], checks)}
    del record["rows"]
    bad = [check for check in checks if check.verdict != OK]
    verdict = OK if not bad and why is None else WRONG if any(check.verdict == WRONG for check in bad) else UNCHECKED
    why = why or "; ".join(check.describe(REFERENCE) for check in bad[:3])
    record["agreement"] |= {"verdict": verdict, "why": why}
    points = {(point["engine"], point["num_steps"]): point for point in record["points"]}
    record["lines"] = [
        _line(f"{case.name}, K = {k}", target, *(points.get((engine, k)) for engine in _ENGINES[case.section]))
        for k, target in case.targets.items()
    ]
    return record


def _line(name: str, target: Target, ours: Record | None, baseline: Record | None) -> dict[str, Any]:
    """What could not be timed has met nothing."""
    theirs = baseline["seconds"] if baseline else None
    line: dict[str, Any] = {"case": name, "floor": None, "ours": None, "baseline": theirs and theirs * 1e3}
    if ours is None:
        line = target.judge(line)
        return {**line, "met": None if line["met"] is None else False}
    mine = ours["seconds"]
    line |= {"floor": ours["floor_seconds"] * 1e3, "ours": mine * 1e3, "milliseconds": mine * 1e3}
    line |= {"speedup": theirs and theirs / mine, "over_floor": ours["time_over_floor"]}
    return target.judge({**line, "over_zero": ours.get("time_over_zero")})
