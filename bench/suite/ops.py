"""`soft_embed`, every case of `bench.cases`."""

from __future__ import annotations

import time

from torch import Tensor

from bench.cases import CASES, COMPILED, MODELS, SMOKE_CASES, SMOKE_COMPILED, Case
from bench.memory import give_back
from bench.op_engines import draw_matrices
from bench.op_measure import judge, measure
from bench.suite.session import Record, Session, say
from bench.suite.summary import shown


def run(session: Session) -> None:
    """The cases in their order of worth; neighbours of one model share its matrices."""
    cases, compiled = (SMOKE_CASES, SMOKE_COMPILED) if session.smoke else (CASES, COMPILED)
    drawn: tuple[str, str] | None = None
    matrices: tuple[Tensor, Tensor | None] | None = None
    for case in cases:
        finished = session.finished(case.name)
        if finished is not None:
            session.records.append(finished)
            continue
        floor = case.floor(session.ceilings(case.dtype))
        # checks, warm-up, graphs; runs of two engines, each some times its floor
        estimate = 1.0 if session.smoke else 2.0 + 60 * floor + (10.0 if case.name in compiled else 0.0)
        if not session.fits(case.name, estimate):
            continue
        started = time.perf_counter()
        with session.surviving(case.name):
            if matrices is None or drawn != (case.model, case.dtype):
                matrices = None  # the old ones go before the new ones come
                matrices = draw_matrices(MODELS[case.model], case.torch_dtype, session.device)
                drawn = case.model, case.dtype
            session.keep(case.name, _measured(session, case, *matrices, compiled=case.name in compiled))
            say(f"ops: {shown(session.records[-1])} ({time.perf_counter() - started:.1f} s)")
    give_back(session.device)


def _measured(session: Session, case: Case, head: Tensor, embed: Tensor | None, *, compiled: bool) -> Record:
    backend = "aot_eager" if session.smoke else "inductor"  # a dry run needs no C++ compiler
    found = measure(
        case,
        head,
        embed,
        session.ceilings(case.dtype),
        compile_backend=backend if compiled else None,
        budget=0.1 if session.smoke else 1.0,
    )
    return judge(found, case)
