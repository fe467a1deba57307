"""The attention of a decode step, in the engine's own pass: our kernel against SDPA and, where installed, flash-attn.

A kernel that is the default for all shapes must be the fastest in each; the record has all, the table the worst.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.agreement import relative_error
from bench.cases import Target
from bench.memory import give_back
from bench.static.launches import Call
from bench.suite.session import Record, Session, say
from bench.timing import captured, for_about
from bench.verdict import WrongResultError, verdict_of
from gircse.engine.decode import DecodePass, has_flash_attention
from gircse.engine.pool import KVPool
from gircse.ops.backends import refusal
from gircse.ops.probe import tolerance_of
from gircse.roofline import Work

NAME, OURS = "decode-attention", "triton"
TARGET = Target(1.0)
_KV_HEADS = 4


class Shape(NamedTuple):
    """Rows, query heads of a key head, columns of a head, slots, all of them seen."""

    rows: int
    group: int
    width: int
    slots: int


SHAPES = [
    Shape(rows, group, width, slots)
    for width, group, (rows, slots) in product(
        (64, 96, 128, 256), (1, 4, 7, 16), ((64, 64), (512, 64), (1, 512), (64, 576), (16, 8192))
    )
]
SMOKE = [Shape(2, 3, 16, 32)]


def run(session: Session) -> None:
    dtype = torch.float32 if session.smoke else torch.bfloat16
    if reason := refusal(session.device, dtype):
        say(f"left out: {NAME}: {reason}")
        return
    session.measure(NAME, 3.0 if session.smoke else 25.0, lambda: _record(session, dtype))
    give_back(session.device)


def calls() -> list[Call]:
    """What is compiled beforehand."""
    return [
        Call("decode_attention", (rows, slots, width, width, _KV_HEADS * group, _KV_HEADS), "bfloat16")
        for rows, group, width, slots in SHAPES
    ]


def _record(session: Session, dtype: torch.dtype) -> Record:
    points = [_point(session, shape, dtype) for shape in (SMOKE if session.smoke else SHAPES)]
    worst = min(points, key=lambda point: point["speedup"])
    what = f"{NAME}, worst of {len(points)}: {worst['shape']}"
    milliseconds = {name: seconds * 1e3 for name, seconds in worst["seconds"].items()}
    line = {"case": what, "floor": worst["floor"] * 1e3, "ours": milliseconds.pop(OURS)}
    line |= {"baseline": min(milliseconds.values()), "speedup": worst["speedup"]}
    return {
        "benchmark": "decode-attention",
        "case": NAME,
        "points": points,
        "agreement": verdict_of(lambda: _agreement(points, dtype)),
        "lines": [TARGET.judge(line)],
    }


def _point(session: Session, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    device, rows = session.device, shape.rows
    generator = torch.Generator(device).manual_seed(0)
    like = torch.empty(0, dtype=dtype, device=device)
    pool, position = KVPool(rows * shape.slots), torch.full((rows,), shape.slots - 1, device=device)
    heads, size = _KV_HEADS * shape.group, (shape.width, shape.width)
    for tensor in pool.buffers(0, rows, shape.slots, _KV_HEADS, size, like):
        tensor.normal_(generator=generator)
    query = torch.randn(rows, heads, shape.width, dtype=dtype, device=device, generator=generator)

    def attention(kernel: str) -> Callable[[], Tensor]:
        kv = DecodePass(pool, rows, shape.slots, position, kernel)
        settings: dict[str, Any] = {"scaling": shape.width**-0.5, "window": None, "softcap": None}
        return lambda: kv.attention(0, query, query, query, **settings)

    others = ["sdpa", *(["flash"] if device.type == "cuda" and has_flash_attention() else [])]
    runs: dict[str, Callable[[], Any]] = {name: attention(name) for name in (OURS, *others)}
    with torch.inference_mode():
        results = {name: call() for name, call in runs.items()}
        graphs = [captured(call, device) for call in runs.values()] if device.type == "cuda" else []
        replays = dict(zip(runs, (replay for replay, _ in graphs), strict=True)) if graphs else runs
        timings = for_about(replays, device, 0.05, fewest=3)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    errors = {name: relative_error(results[OURS], results[name]) for name in others}
    elements = rows * shape.width * shape.slots
    work = Work(4 * heads * elements, 2 * dtype.itemsize * _KV_HEADS * elements)
    floor = session.ceilings(str(dtype).removeprefix("torch.")).seconds([work])
    speedup = min(seconds[name] for name in others) / seconds[OURS]
    return {"shape": "x".join(map(str, shape)), "seconds": seconds, "floor": floor, "speedup": speedup} | {
        "worst_error": max(errors.values())
    }


def _agreement(points: list[dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    worst = max(points, key=lambda point: point["worst_error"])
    if not worst["worst_error"] <= tolerance_of(dtype):
        raise WrongResultError(f"the kernels differ by {worst['worst_error']:.1e} at {worst['shape']}")
    return {"worst_error": worst["worst_error"]}
