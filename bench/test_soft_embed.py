"""`soft_embed` under pytest-benchmark, beside eager PyTorch and `torch.compile` of it: `pytest bench/`.

A group for each case, an engine for each line of it; peak extra memory and the floor are in `extra_info`, so that
`--benchmark-json FILE` has everything. On CUDA the cases of `bench/gpu_suite.py`, on the CPU small ones. A case whose
results are wrong fails before it is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, CPU_CASES, Case
from bench.floors import measure_ceilings
from bench.memory import peak_extra_bytes
from bench.op_engines import ENGINE_NAMES, Op, Problem, check, compiled, draw_matrices, eager, ours
from bench.op_measure import is_out_of_memory
from bench.timing import cache_buffer, synchronize
from gircse.roofline import Ceilings

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20 if DEVICE.type == "cuda" else 5


@lru_cache(maxsize=1)  # neighbours in the list share them; two large models would not fit
def _matrices(model: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return draw_matrices(Case(model, 1).matrices, dtype, DEVICE)


@lru_cache(maxsize=1)
def _checked(case: Case) -> Problem:
    problem = Problem.draw(case.rows, case.what, *_matrices(case.model, case.torch_dtype))
    check(problem)
    return problem


@lru_cache
def _ceilings(dtype: torch.dtype) -> Ceilings:
    return measure_ceilings(DEVICE, dtype)


def _engine(name: str) -> Op:
    return compiled() if name == "compiled" else {"eager": eager, "ours": ours}[name]


def _warm_up(name: str, run: Callable[[], Any]) -> None:
    """Skips what this machine cannot do: compile, or hold eager's [T, V] tensors."""
    try:
        run()
    except Exception as error:
        if name == "ours":
            raise
        if is_out_of_memory(error):
            pytest.skip(f"{name}: out of memory")
        if name == "eager":
            raise
        pytest.skip(f"torch.compile: {str(error).strip().splitlines()[0]}")


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("case", CASES if DEVICE.type == "cuda" else CPU_CASES, ids=lambda case: case.name)
def test_soft_embed(benchmark: Any, case: Case, engine: str) -> None:
    run = _checked(case).call(_engine(engine))
    _warm_up(engine, run)
    benchmark.group = case.name
    benchmark.extra_info |= {
        "engine": engine,
        "peak_extra_bytes": peak_extra_bytes(run, DEVICE),
        "floor_seconds": case.floor(_ceilings(case.torch_dtype)),
        "device": str(DEVICE),
    }
    buffer = cache_buffer(DEVICE) if DEVICE.type == "cuda" else None

    def cold() -> None:
        """Nothing of the round before is in the cache, and nothing of it is still running."""
        if buffer is not None:
            buffer.zero_()
        synchronize(DEVICE)

    def timed() -> None:
        run()
        synchronize(DEVICE)

    benchmark.pedantic(timed, setup=cold, rounds=ROUNDS, warmup_rounds=1)
