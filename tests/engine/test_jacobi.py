"""Jacobi decoding against one step after the other: every architecture, rows that settle and rows that do not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from gircse.engine import EngineConfig
from gircse.engine.body import StockDecoder
from gircse.engine.jacobi import FASTER, Jacobi, JacobiPass, first_token, is_faster, jacobi_pass
from gircse.lm.attention import RolloutKV
from gircse.ops.pooling import pool_steps
from tests.engine.test_capture_safety import ROWS, SLOTS, fused, prepared, two_steps
from tests.engine.test_engine import LENGTHS, engine_of, relative_error, rows_of
from tests.tiny_models import CONFIGS

K = 6
EXACT = Jacobi("mean", 0.0)
TOLERANCE = 1e-6


def with_buckets(engine):
    """Rows and tokens in the buckets of captured graphs."""
    engine._limits = replace(engine._limits, row_buckets=True)
    return engine


def plain_passes(lm, row, num_tokens, pooling):
    """The definition, every token in every pass: -> the number of passes until z_K moves less than the tolerance, and
    the states then."""
    ids = torch.tensor([row])
    kv = RolloutKV(torch.tensor([len(row)]))
    prompt = lm.run_prompt(kv, ids)[:, -1:]
    before, embedding = prompt.expand(-1, num_tokens, -1), None
    passes = 0
    while passes < num_tokens:
        passes, states = passes + 1, lm.run_block(kv, lm.soft_embed(before))
        previous, embedding = embedding, pool_steps(states, pooling)[0, -1]
        if previous is not None and 1 - torch.cosine_similarity(previous, embedding, dim=0) < TOLERANCE:
            break
        before = torch.cat([prompt, states[:, :-1]], dim=1)
    return passes, states[0]


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_tolerance_0_is_the_sequential_result(name, buckets, no_downcast):
    """Windows, soft-caps, unequal rows behind a prefix; by our decoder too, where it knows the layers."""
    rows = rows_of(LENGTHS, prefix=9)
    config = EngineConfig(fused_kernels="always" if buckets and name != "gpt2" else "never")
    engine = engine_of(name, config)
    expected = engine.states(rows, K)
    if buckets:
        engine = with_buckets(engine)
    assert relative_error(engine.states(rows, K, jacobi=EXACT), expected) <= 1e-12
    assert engine.report().passes == {K: len(rows)}


@pytest.mark.parametrize(("name", "pooling", "buckets"), [("qwen3", "mean", False), ("gemma2", "last", True)])
def test_rows_stop_when_they_have_settled(name, pooling, buckets, no_downcast):
    """Each with the states and after the passes that the definition gives it alone."""
    engine, rows = engine_of(name), rows_of(LENGTHS, prefix=5)
    if buckets:
        engine = with_buckets(engine)
    with torch.inference_mode():
        expected = [plain_passes(engine.lm, row, 12, pooling) for row in rows]
    passes = [done for done, _ in expected]
    assert 2 < min(passes) < max(passes)
    assert (max(passes) == 12) == (name == "qwen3")  # a row that does not settle is exact
    states = engine.states(rows, 12, jacobi=Jacobi(pooling, TOLERANCE))
    assert relative_error(states, torch.stack([found for _, found in expected])) <= 1e-10
    assert engine.report().passes == {done: passes.count(done) for done in set(passes)}


@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_prompts_state_may_be_the_first(num_steps):
    engine, rows = engine_of("llama"), rows_of(LENGTHS)
    expected = engine.states(rows, num_steps, include_prompt=True)
    found = engine.states(rows, num_steps, include_prompt=True, jacobi=EXACT)
    assert relative_error(found, expected) <= 1e-12


def test_the_same_text_whatever_its_batch():
    rows, jacobi = rows_of(LENGTHS, prefix=6), Jacobi("mean", 1e-4)
    together = engine_of("llama", dtype=torch.float32).states(rows, K, jacobi=jacobi).mean(1)
    alone = engine_of("llama", EngineConfig(max_rows=1, reuse_prefix=False), dtype=torch.float32)
    torch.testing.assert_close(alone.states(rows, K, jacobi=jacobi).mean(1), together, atol=1e-5, rtol=0)


def test_adaptive_k_takes_the_first_number_of_steps_that_settles():
    engine, rows, found = engine_of("llama"), rows_of(LENGTHS), {}

    def settled(states):
        return torch.arange(len(states)) % 4 + 2 <= states.shape[1]

    def keep(chosen, states, counts):
        found.update(zip(chosen, zip(states, counts.tolist(), strict=True), strict=True))

    engine.run(rows, 4, keep, settled=settled, jacobi=EXACT)
    assert sorted(count for _, count in found.values()) == [2, 2, 3, 3, 4, 4, 4]
    for row, expected in enumerate(engine.states(rows, 4)):
        assert relative_error(found[row][0], expected) <= 1e-12


@pytest.mark.parametrize("decoder", [StockDecoder, fused])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_two_passes_are_the_same_operations(name, decoder):
    """What a CUDA graph needs of a pass; also of the first one, which has other tokens."""
    for first in (0, 1):
        lm, state, pool, body = prepared(name, decoder)
        kv = JacobiPass(pool, ROWS, SLOTS, state.position, first, 4)
        calls = two_steps(partial(jacobi_pass, lm, body, kv, state, 1.0, "mean", 0))
        assert len(calls[0]) > 20
        assert calls[0] == calls[1]


def test_tokens_of_a_pass():
    assert [first_token(done, 7, 1) for done in range(7)] == list(range(7))
    assert [first_token(done, 7, 4) for done in range(7)] == [0, 1, 1, 3, 3, 3, 3]
    assert {20 - first_token(done, 20, 8) for done in range(20)} == {20, 19, 16, 8}
    assert [first_token(done, 2, 4) for done in range(2)] == [0, 1]


def test_auto_takes_what_is_faster():
    for device in ("cpu", "cuda"):
        one, *_, last = (line for line in FASTER if line.device == device)
        assert is_faster(device, 1, last.rows, 20, 20 * last.passes)
        assert not is_faster(device, 1, last.rows, 20, 20 * last.passes + 1)  # texts that do not settle
        assert not is_faster(device, 1, last.rows, last.tokens - 1, 0.0)
        assert not is_faster(device, 1, last.rows + 1, 20, 0.0)
        assert is_faster(device, 1, one.rows, 20, 20 * one.passes)
        assert not is_faster(device, 1, 1, 20, 20 * one.passes + 1)
        assert not is_faster(device, 1, 1, one.tokens - 1, 0.0)
    assert not is_faster("mps", 1, 1, 20, 4.0)


def test_auto_on_the_engine():
    """One row, by our decoder, which writes on the tokens that it is given."""
    engine = engine_of("llama", EngineConfig(fused_kernels="always"))
    rows, auto = rows_of((5,)), Jacobi("mean", 0.0, auto=True)
    expected = engine.states(rows, 16)
    for _ in range(2):  # the second time by single steps, because no row has settled
        assert relative_error(engine.states(rows, 16, jacobi=auto), expected) <= 1e-6
        assert engine.report().passes == {16: 1}
    engine.states(rows, 16, jacobi=replace(auto, tolerance=2.0))  # of which nothing is known yet
    assert engine.report().passes == {2: 1, 16: 1}


def test_a_pass_has_no_more_tokens_than_a_prefill():
    engine, sizes = engine_of("llama", EngineConfig(prefill_tokens=3 * K)), []
    engine.run(rows_of((4,) * 5), K, lambda chosen, states, counts: sizes.append(len(chosen)), jacobi=EXACT)
    assert sizes == [3, 2]
