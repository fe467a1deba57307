"""How kernels and bytes of a step are counted, and that a layer of our decoder takes nine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gircse.engine import varlen
from gircse.engine.body.probe import fused_decoder
from gircse.engine.decode import DecodePass
from gircse.engine.jacobi import JacobiPass
from gircse.engine.pool import KVPool
from gircse.engine.prefill import PrefillPass
from gircse.engine.state import DecodeState
from gircse.engine.step_cost import step_cost
from gircse.lm.causal_lm import CausalLM
from tests.engine.test_varlen import operator  # noqa: F401
from tests.tiny_models import tiny_model

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
    assert cost == (2, 8, launches, size + keys_and_values, 1)


@pytest.fixture
def unlaunched(monkeypatch):
    """Triton's kernels are told to whoever counts, and not run, because values do not matter."""
    launching = pytest.importorskip("gircse_kernels.launching")

    def launch(kernel, grid, arguments, config, **constants):
        for observer in launching._OBSERVERS:
            observer(arguments)

    monkeypatch.setattr(launching, "launch", launch)


def on_kernels(name):
    """Our decoder of a model as a GPU would run it."""
    from gircse_kernels import decoder as kernels

    lm = CausalLM.from_model(tiny_model(name))
    decoder = fused_decoder(lm, "sdpa")
    decoder._ops = kernels
    return lm, decoder


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3"])  # biases, soft-caps, norms of queries and keys
def test_a_step_is_nine_launches_a_layer_and_one(name, unlaunched):
    lm, decoder = on_kernels(name)
    pool, state = KVPool(3 * 48), DecodeState.allocate(3, 4, torch.empty(0, lm.hidden_size))
    kv = DecodePass(pool, 3, 48, state.position, "triton")

    def step():
        kv.begin()
        decoder.step(kv, state.hidden, state)

    with torch.inference_mode():
        step()  # makes tables and workspaces
        cost = step_cost(step, pool, state, 48)
    layers = lm.config.num_hidden_layers
    assert cost.launches == 9 * layers + 1
    weights = sum(parameter.nbytes for parameter in lm.body.layers.parameters())
    assert weights < cost.bytes - pool.bytes < 1.5 * weights


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_prefill_is_nine_launches_a_layer_and_six_at_most(name, unlaunched, operator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    lm, decoder = on_kernels(name)
    pool, state = KVPool(3 * 48), DecodeState.allocate(3, 4, torch.empty(0, lm.hidden_size))

    def prefill():
        decoder.prefill(PrefillPass(pool, 3, 48, 0, [[5] * 9, [6, 7], [8]], None, lm.device))

    with torch.inference_mode():
        prefill()
        cost = step_cost(prefill, pool, state, 48)
    assert cost.launches <= 9 * lm.config.num_hidden_layers + 6


def test_the_layers_of_a_jacobi_pass_are_nine_launches_each(
    unlaunched,
    operator,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    lm, decoder = on_kernels("qwen2")
    pool, state = KVPool(3 * 48), DecodeState.allocate(3, 4, torch.empty(0, lm.hidden_size))
    decoder.prefill(PrefillPass(pool, 3, 48, 0, [[5] * 9, [6, 7], [8]], None, lm.device))
    kv = JacobiPass(pool, 3, 48, state.position, 1, 4)

    def one_pass():
        kv.begin()
        decoder.block(kv, torch.empty(9, lm.hidden_size))

    with torch.inference_mode():
        one_pass()
        cost = step_cost(one_pass, pool, state, 48, 3)
    assert cost.launches <= 9 * lm.config.num_hidden_layers + 6


@pytest.mark.parametrize("matrices", [(151_936, 896, True), (32_000, 4096, False), (152_064, 3584, False)])
def test_a_soft_token_is_two_to_five_launches(matrices):
    pytest.importorskip("triton")
    from bench.static.launches import DEVICES, Call, record

    vocab, width, tied = matrices
    for rows in (1, 16, 64, 128):
        launches, products = record(Call("soft_embed", (rows, vocab, width, width), "bfloat16", tied), DEVICES[90])
        assert 2 <= len(launches) + len(products) <= 5
