"""The contrastive loss against eager float32, forward and backward of both sides."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Target
from bench.info_nce import CUDA, SMOKE, Size, check, floor, measure
from bench.suite.session import Session, say
from bench.verdict import verdict_of

SIZES = (Size(1024, 2048, 5, 896), CUDA[0])
SMOKE_SIZES = SMOKE
_TARGET = Target(1.5, memory_ratio=1 / 5)
_LOSSES = ("eager", "ours")


def run(session: Session) -> None:
    torch.set_float32_matmul_precision("highest")  # the baseline's float32 is exact
    for size in SMOKE_SIZES if session.smoke else SIZES:
        name = f"info_nce-B{size.rows}-M{size.candidates}-D{size.width}"
        finished = session.finished(name)
        if finished is not None:
            session.records.append(finished)
        elif session.fits(name, 1 if session.smoke else 10):
            with session.surviving(name):
                session.keep(name, _measured(session, name, size))
                say(f"loss: {name} done")


def _measured(session: Session, name: str, size: Size) -> dict[str, Any]:
    ceilings = session.ceilings("float32")
    point = measure(size, session.device, torch.float32, 5, _LOSSES)
    times, peaks = point["milliseconds"], point["peak_extra_bytes"]
    least = ceilings.seconds([floor(size, torch.float32)]) * 1e3
    line = _TARGET.judge(
        {
            "case": name,
            "floor": least,
            "ours": times["ours"],
            "baseline": times["eager"],
            "speedup": times["eager"] / times["ours"],
            "memory_ratio": peaks["ours"] / peaks["eager"],
        }
    )
    return {
        "benchmark": "info_nce",
        "case": name,
        "dtype": "float32",
        "repeats": 5,
        "points": [{**point, "floor_milliseconds": least}],
        "ceilings": vars(ceilings),
        "agreement": verdict_of(lambda: {"worst_error": check(session.device, torch.float32, size.width)}),
        "lines": [line],
    }
