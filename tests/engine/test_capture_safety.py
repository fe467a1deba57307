"""The engine's step can be captured (`tests.capture_guard` says what a CUDA graph forbids)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gircse.engine import step
from gircse.engine.body import StockDecoder
from gircse.engine.body.probe import fused_decoder
from gircse.engine.pool import KVPool
from gircse.engine.prefill import PrefillPass
from gircse.engine.state import DecodeState
from gircse.engine.step import StepRunner
from gircse.lm.causal_lm import CausalLM
from tests.capture_guard import CaptureError, two_steps
from tests.tiny_models import CONFIGS, tiny_model

ROWS, SLOTS = 3, 48


def prepared(name, decoder=StockDecoder):
    """A model whose prompts are in the pool, and its state."""
    lm = CausalLM.from_model(tiny_model(name))
    pool, lengths = KVPool(ROWS * SLOTS), [9, 5, 2]
    texts = [torch.randint(3, 100, (length,)).tolist() for length in lengths]
    decoder = decoder(lm)
    with torch.no_grad():
        hidden = decoder.prefill(PrefillPass(pool, ROWS, SLOTS, 0, texts, None, lm.device))
    state = DecodeState.allocate(ROWS, 4, hidden)
    state.hidden.copy_(hidden)
    state.position.copy_(torch.tensor(lengths))
    return lm, state, pool, decoder


def prepared_step(name, decoder=StockDecoder):
    lm, state, pool, decoder = prepared(name, decoder)
    return lm, state, StepRunner(lm, capture="never", kernel="sdpa").bind(decoder, pool, state, SLOTS, 1.0)


def fused(lm):
    return fused_decoder(lm, "sdpa")


@pytest.mark.parametrize(
    ("name", "decoder"), [(name, d) for name in CONFIGS for d in (StockDecoder, fused) if name != "gpt2" or d != fused]
)
def test_two_steps_are_the_same_operations(name, decoder):
    _, state, step = prepared_step(name, decoder)
    first, second = two_steps(step)
    assert len(first) > 20
    assert first == second
    assert state.step.tolist() == [2, 2, 2]
    assert state.position.tolist() == [11, 7, 4]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda state: state.hidden[0, 0].item(), "waits for the device"),
        (lambda state: int(state.position.max()), "waits for the device"),
        (lambda state: (state.hidden > 0).nonzero(), "depends on values"),
        (lambda state: state.hidden[state.position > 3], "depends on values"),
    ],
)
def test_the_guard_sees_a_synchronisation(fault, message):
    _, state, step = prepared_step("llama")

    def faulty():
        step()
        fault(state)

    with pytest.raises(CaptureError, match=message):
        two_steps(faulty)


def test_the_guard_sees_a_number_that_changed():
    _, state, step = prepared_step("llama")
    counter = iter(range(10))

    def faulty():
        step()
        state.hidden.add_(float(next(counter)))

    first, second = two_steps(faulty)
    assert first != second


def test_the_guard_sees_memory_that_changed():
    _, state, step = prepared_step("llama")

    def swapped():
        step()
        state.hidden.add_(outside.pop())

    outside = [torch.ones(1), torch.ones(1)]
    first, second = two_steps(swapped)
    assert first != second


def test_a_capture_that_fails_falls_back_with_one_warning(monkeypatch):
    lm, state, _ = prepared_step("llama")
    runner = StepRunner(lm, capture="never", kernel="sdpa")
    runner.captures = True
    attempts = []

    def refused(*_):
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(runner, "_capture", refused)
    pool = KVPool(ROWS * SLOTS)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph and runs eagerly.*not permitted"):
        step = runner.bind(StockDecoder(lm), pool, state, SLOTS, 1.0)
    assert callable(step)
    runner.bind(StockDecoder(lm), pool, state, SLOTS, 0.5)
    assert len(attempts) == 1
    assert runner.refusal == "RuntimeError: operation not permitted when stream is capturing"


def test_a_new_graph_replaces_the_one_that_was_not_used_for_the_longest_time(monkeypatch):
    lm, state, _ = prepared_step("llama")
    runner = StepRunner(lm, capture="never", kernel="sdpa")
    runner.captures, captured = True, []
    monkeypatch.setattr(step, "MAX_GRAPHS", 2)
    monkeypatch.setattr(runner, "_capture", lambda run, *_: captured.append(run) or SimpleNamespace(replay=run))
    decoder, pool = StockDecoder(lm), KVPool(ROWS * SLOTS)
    bound = [runner.bind(decoder, pool, state, SLOTS, temperature) for temperature in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0)]
    assert [captured.index(function) for function in bound] == [0, 1, 0, 2, 0, 3]
