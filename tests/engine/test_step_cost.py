"""How kernels and bytes of a step are counted, and how many there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gircse.engine.pool import KVPool
from gircse.engine.state import DecodeState
from gircse.engine.step_cost import step_cost

D = 8
A, B, BIAS = torch.ones(4, D), torch.ones(D, D), torch.ones(D)
OPERATIONS = {
    "a product": (lambda: A @ B, 1, 4 * (4 * D + D * D + 4 * D)),
    "a layer with a bias": (lambda: F.linear(A, B, BIAS), 1, 4 * (4 * D + D * D + 4 * D + D)),
    "in place": (lambda: A.mul_(A), 1, 4 * 4 * D),
    "views and empty tensors": (lambda: torch.empty_like(A.view(2, -1).t()).detach()[0], 0, 0),
    "no copy": (lambda: A.contiguous().reshape(-1).to(torch.float32), 0, 0),
    "a copy": (lambda: B.t().contiguous(), 1, 4 * 2 * D * D),
    "an expanded operand": (lambda: BIAS.expand(100, D) + 1, 1, 4 * (D + 100 * D)),
    "a part of the pool": (lambda: POOL.layer(0, 2, 16)[0][:, :, 3].copy_(A[:2, None]), 1, 4 * 2 * D),
}
POOL = KVPool(32)
POOL.buffers(0, 2, 16, 1, (D, D), A)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("operation", "launches", "size"), OPERATIONS.values(), ids=OPERATIONS.keys())
def test_operators_are_counted_as_kernels(operation, launches, size, mode):
    state = DecodeState.allocate(2, 3, A)
    with mode():
        cost = step_cost(operation, POOL, state, 8)
    keys_and_values = 2 * 8 * (2 * D * 4)  # rows, slots, bytes of a token
    assert cost == (2, 8, launches, size + keys_and_values)
