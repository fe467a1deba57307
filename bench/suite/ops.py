"""The ops alone: `soft_embed` in every case of `bench.cases`, and the contrastive loss against eager float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import info_nce
from bench.cases import CASES, COMPILED, MODELS, SMOKE_CASES, SMOKE_COMPILED, Case, Target
from bench.info_nce import Size
from bench.memory import give_back
from bench.op_engines import draw_matrices
from bench.op_measure import judge, measure
from bench.suite.session import Record, Session
from bench.verdict import verdict_of

SIZES = (Size(1024, 2048, 5, 896), info_nce.CUDA[0])
LOSS_TARGET = Target(1.5, memory_ratio=1 / 5)


def run(session: Session) -> None:
    """The cases in their order of worth; neighbours of one model share its matrices."""
    cases, compiled = (SMOKE_CASES, SMOKE_COMPILED) if session.smoke else (CASES, COMPILED)
    drawn: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}

    def measured(case: Case) -> Record:
        key = case.model, case.dtype
        if key not in drawn:
            drawn.clear()  # the old matrices go before the new ones come
            drawn[key] = draw_matrices(MODELS[case.model], case.torch_dtype, session.device)
        backend = "aot_eager" if session.smoke else "inductor"  # a dry run needs no C++ compiler
        record = measure(
            case,
            *drawn[key],
            session.ceilings(case.dtype),
            compile_backend=backend if case.name in compiled else None,
            budget=0.1 if session.smoke else 1.0,
        )
        return judge(record, case)

    for case in cases:
        # checks, warm-up, graphs; runs of two engines, each some times its floor
        seconds = 2.0 + 60 * case.floor(session.ceilings(case.dtype)) + (10.0 if case.name in compiled else 0.0)
        session.measure(case.name, 1.0 if session.smoke else seconds, lambda case=case: measured(case))
    give_back(session.device)


def run_loss(session: Session) -> None:
    """Forward and backward of both sides."""
    torch.set_float32_matmul_precision("highest")  # the baseline's float32 is exact
    for size in info_nce.SMOKE if session.smoke else SIZES:
        name = f"info_nce-B{size.rows}-M{size.candidates}-D{size.width}"
        session.measure(name, 1 if session.smoke else 10, lambda name=name, size=size: _loss(session, name, size))


def _loss(session: Session, name: str, size: Size) -> dict[str, Any]:
    device = session.device
    rate, products = info_nce.arithmetic(device, torch.float32)
    ceilings = session.ceilings(str(rate).removeprefix("torch."))
    point = info_nce.measure(size, device, torch.float32, 5, ("eager", "ours"))
    times, peaks = point["milliseconds"], point["peak_extra_bytes"]
    floor = ceilings.seconds([info_nce.floor(size, torch.float32, products)]) * 1e3
    line = {
        "case": name,
        "floor": floor,
        "ours": times["ours"],
        "baseline": times["eager"],
        "speedup": times["eager"] / times["ours"],
        "memory_ratio": peaks["ours"] / peaks["eager"],
    }
    return {
        "benchmark": "info_nce",
        "case": name,
        "dtype": "float32",
        "repeats": 5,
        "points": [{**point, "floor_milliseconds": floor}],
        "ceilings": vars(ceilings),
        "agreement": verdict_of(lambda: {"worst_error": info_nce.check(device, torch.float32, size.width)}),
        "lines": [LOSS_TARGET.judge(line)],
    }
