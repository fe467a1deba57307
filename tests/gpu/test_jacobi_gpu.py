"""Captured Jacobi passes on a GPU against captured single steps."""

from __future__ import annotations

import pytest
import torch

from gircse.engine import EngineConfig, Jacobi
from tests.engine.test_engine import LENGTHS, relative_error, rows_of
from tests.gpu.test_engine_gpu import engine_on_gpu

STEPS = 10


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
def test_tolerance_0_is_the_sequential_result(name: str) -> None:
    engine = engine_on_gpu(name, EngineConfig(capture="always"))
    for seed, lengths in enumerate((LENGTHS, LENGTHS[:3], LENGTHS)):
        rows = rows_of(lengths, seed=seed, prefix=9)
        found = engine.states(rows, STEPS, jacobi=Jacobi("mean", 0.0))
        assert relative_error(found, engine.states(rows, STEPS)) <= 1e-4
    passes = [cost for cost in engine.report().steps if cost.tokens > 1]
    assert {cost.tokens for cost in passes} == {10, 9, 8}
    per_layer = 25 if name == "gemma2" else 16  # attention with a soft-cap, or in float32, is plain PyTorch
    assert max(cost.launches for cost in passes) <= per_layer * engine.lm.config.num_hidden_layers + 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_single_steps_do(dtype: torch.dtype) -> None:
    rows = rows_of(LENGTHS, prefix=9)
    exact = engine_on_gpu("mistral", EngineConfig(capture="never"), torch.float64).states(rows, STEPS)
    engine = engine_on_gpu("mistral", EngineConfig(capture="always"), dtype)
    errors = [relative_error(engine.states(rows, STEPS, jacobi=how), exact) for how in (Jacobi("mean", 0.0), None)]
    assert errors[0] <= 2 * errors[1]


def test_rows_that_settle_leave_and_none_depends_on_its_batch() -> None:
    engine = engine_on_gpu("qwen3", EngineConfig(capture="always", reuse_prefix=False))
    alone = engine_on_gpu("qwen3", EngineConfig(capture="always", reuse_prefix=False, max_rows=1))
    rows, jacobi = rows_of(LENGTHS, prefix=5), Jacobi("mean", 1e-4)
    together = engine.states(rows, STEPS, jacobi=jacobi)
    assert len(engine.report().passes) > 1
    assert relative_error(alone.states(rows, STEPS, jacobi=jacobi), together) <= 1e-4
    assert alone.report().passes == engine.report().passes
