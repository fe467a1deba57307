"""The operators of a training step stay few, on the CPU and on the path of a GPU. Each limit is the count of the day it
was set and a twentieth more."""

from __future__ import annotations

import pytest

from bench.step_operators import operators_of_a_step

STOCK = {"pow", "rsqrt", "silu"}


@pytest.mark.parametrize(("num_steps", "factor", "limit"), [(20, 0.0, 6_940), (5, 1.0, 4_870)])
def test_on_the_cpu(num_steps, factor, limit):
    assert 0.5 * limit < operators_of_a_step(num_steps, factor).total() <= limit


@pytest.mark.parametrize(("num_steps", "factor", "limit"), [(20, 0.0, 2_710), (5, 1.0, 2_920)])
def test_on_a_gpu(num_steps, factor, limit):
    pytest.importorskip("triton")
    counts = operators_of_a_step(num_steps, factor, cuda=True)
    assert 0.5 * limit < counts.total() <= limit
    assert not STOCK & {name for name, count in counts.items() if count}
    steps = num_steps - 1 if factor == 0 else 0
    assert counts["decode_attention_kernel"] == 4 * steps  # once for each layer and drafted token
    assert counts["pool_kernel"] == 4
    assert counts["gate_grad_kernel"] > 0
