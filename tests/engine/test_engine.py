"""The engine against the plain method: every architecture, packed prefill, static decoding, reused buffers."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from gircse.engine import Engine, EngineConfig, decode
from gircse.engine.body import StockDecoder
from gircse.engine.decode import decode_kernel
from gircse.lm.causal_lm import CausalLM
from tests.plain import plain_rollout
from tests.tiny_models import CONFIGS, VOCAB, definition, tiny_model

K = 6
LENGTHS = (3, 97, 1, 24, 24, 8, 61)
CONFIGURATIONS = {
    "one-batch": EngineConfig(reuse_prefix=False),
    "prefix": EngineConfig(),
    "small-batches": EngineConfig(max_rows=3, prefill_tokens=40),
    "triton": EngineConfig(decode_attention="triton"),
}


def rows_of(lengths, *, seed=0, prefix=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(3, VOCAB, (prefix,), generator=generator).tolist()
    return [shared + torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def plain(name, rows, num_steps, *, dtype=torch.float64):
    """[n, max(K, 1), D] of the stock model, a row at a time, the whole sequence every step."""
    model = tiny_model(name, dtype=dtype, attn=definition(name))
    with torch.no_grad():
        rollouts = [plain_rollout(model, torch.tensor(row), num_steps) for row in rows]
    return torch.stack([steps if num_steps else prompt[None] for prompt, steps in rollouts])


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def engine_of(name, config=None, *, dtype=torch.float64, **overrides):
    return Engine(CausalLM.from_model(tiny_model(name, dtype=dtype, **overrides)), config)


@pytest.mark.parametrize("how", [name for name in CONFIGURATIONS if name != "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_stock_model(name, how, no_downcast):
    """Rows of very different length; then other prompt lengths through the same buffers."""
    engine = engine_of(name, CONFIGURATIONS[how])
    for lengths, seed, num_steps in ((LENGTHS, 0, K), ((50, 2, 130), 1, K), (LENGTHS[:4], 2, K), (LENGTHS[:4], 2, 0)):
        states = engine.states(rows_of(lengths, seed=seed, prefix=9), num_steps)
        assert relative_error(states, truth(name, lengths, seed, num_steps)) <= 1e-9


@functools.cache
def truth(name, lengths, seed, num_steps):
    """What every configuration is compared with, once for all of them; inside `no_downcast` alone."""
    return plain(name, rows_of(lengths, seed=seed, prefix=9), num_steps)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_stock_model_in_its_own_precision(name):
    """As above with the norms and softmaxes in float32, as the models have them."""
    rows = rows_of(LENGTHS, prefix=5)
    assert relative_error(engine_of(name).states(rows, K), plain(name, rows, K)) <= 1e-5


@pytest.mark.parametrize("name", ["gemma2"])  # windows, soft-caps, grouped heads
def test_our_decode_kernel_gives_the_same(name):
    pytest.importorskip("triton")
    rows = rows_of((5, 20, 1))
    expected = engine_of(name, dtype=torch.float32).states(rows, 3)
    got = engine_of(name, CONFIGURATIONS["triton"], dtype=torch.float32).states(rows, 3)
    assert relative_error(got, expected) <= 1e-5


def test_temperature():
    rows, model = rows_of((4, 9)), tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([plain_rollout(model, torch.tensor(row), 2, temperature=0.3)[1] for row in rows])
    assert relative_error(engine_of("llama").states(rows, 2, temperature=0.3), expected) <= 1e-5


def test_more_steps_than_the_buffers_were_made_for():
    engine, rows = engine_of("llama"), rows_of((4, 9))
    engine.states(rows, 2)
    assert relative_error(engine.states(rows, 50), plain("llama", rows, 50)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_text_whatever_its_batch(dtype):
    rows = rows_of(LENGTHS, prefix=6)
    together = engine_of("llama", dtype=dtype).states(rows, K).float().mean(1)
    for config in CONFIGURATIONS["small-batches"], EngineConfig(max_rows=1, reuse_prefix=False):
        alone = engine_of("llama", config, dtype=dtype).states(rows, K).float().mean(1)
        if dtype == torch.float32:
            torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
        else:
            assert torch.cosine_similarity(alone, together).min() >= 0.9999


def test_steps_are_bitwise_the_prefixes_of_a_longer_run():
    engine, rows = engine_of("llama", dtype=torch.float32), rows_of(LENGTHS, prefix=6)
    steps = engine.states(rows, 32)
    for k in (1, 5, 20):
        assert torch.equal(engine.states(rows, k), steps[:, :k])


def test_a_row_that_overflows_does_not_spoil_the_next_batch():
    engine, rows = engine_of("llama", dtype=torch.float32), rows_of(LENGTHS)
    expected = engine.states(rows, K)
    weight = engine.lm.embed_weight
    with torch.no_grad():
        kept = weight[5].clone()
        weight[5] = float("nan")
    assert engine.states([[5, 5, 5]], K).isnan().any()
    with torch.no_grad():
        weight[5] = kept
    assert torch.equal(engine.states(rows, K), expected)


def test_prefix_is_encoded_once(monkeypatch):
    engine, rows = engine_of("llama"), rows_of(LENGTHS, prefix=20)
    tokens, prefill = [], StockDecoder.prefill

    def counted(self, kv):
        tokens.append(len(kv.ids))
        return prefill(self, kv)

    monkeypatch.setattr(StockDecoder, "prefill", counted)
    engine.states(rows, 1)
    assert tokens == [20, sum(LENGTHS)]  # nothing but the texts' own tokens: no padding, no prefix


def test_kv_budget_bounds_the_pool():
    config = EngineConfig(kv_bytes=200_000)
    engine, rows = engine_of("llama", config, dtype=torch.float32), rows_of((30,) * 40)
    states = engine.states(rows, 3)
    report = engine.report()
    assert 0 < report.kv_bytes <= 200_000
    assert relative_error(states, plain("llama", rows, 3, dtype=torch.float32)) <= 1e-4


def test_report_names_what_is_held():
    engine = engine_of("llama", dtype=torch.float32)
    assert engine.report().kv_bytes == 0
    engine.states(rows_of((3, 4)), 2)
    report = engine.report()
    assert report.kv_bytes > 0
    assert report.state_bytes > 0
    assert report.graphs == []
    assert report.not_captured is None


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate", None])
def test_out_of_memory_halves_the_batch_once_warned_and_loses_nothing(monkeypatch, message):
    engine, rows = engine_of("llama"), rows_of(LENGTHS * 3)
    expected = engine.states(rows, 3)
    sizes, run_batch = [], Engine._run_batch

    def scarce(self, batch, *rest):
        sizes.append(len(batch.rows))
        if len(batch.rows) > 5:
            raise torch.OutOfMemoryError("out of memory") if message is None else RuntimeError(message)
        return run_batch(self, batch, *rest)

    monkeypatch.setattr(Engine, "_run_batch", scarce)
    with pytest.warns(UserWarning, match="out of memory: batches are halved") as caught:
        assert relative_error(engine.states(rows, 3), expected) <= 1e-12
    assert len(caught) == 1
    assert sizes[0] == len(rows)
    assert max(sizes[-4:]) <= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.states(rows, 3)


def test_out_of_memory_with_one_row_is_raised(monkeypatch):
    def never(self, *_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Engine, "_run_batch", never)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="halved"):
        engine_of("llama").states(rows_of((2, 3)), 1)


def test_other_errors_are_not_swallowed(monkeypatch):
    def broken(self, *_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Engine, "_run_batch", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        engine_of("llama").states(rows_of((2, 3)), 1)


def test_an_empty_row_is_named():
    with pytest.raises(ValueError, match=r"rows\[1\]: got no token"):
        engine_of("llama").states([[3], []], 1)


def test_settled_rows_leave_and_the_rest_runs_on():
    engine, rows = engine_of("llama"), rows_of(LENGTHS)
    full, widths, found = engine.states(rows, 9), [], {}

    def settled(states):
        widths.append(len(states))
        # every third row once three steps are done, another third after five
        done = torch.zeros(len(states), dtype=torch.bool)
        if states.shape[1] == 3:
            done[::3] = True
        if states.shape[1] == 5:
            done[1::2] = True
        return done

    def keep(chosen, states, counts):
        for row, steps, count in zip(chosen, states, counts.tolist(), strict=True):
            found[row] = steps[:count]

    engine.run(rows, 9, keep, settled=settled)
    assert sorted(found) == list(range(len(rows)))
    for row, steps in found.items():
        torch.testing.assert_close(steps, full[row, : len(steps)], atol=1e-9, rtol=1e-9)
    assert sorted({len(steps) for steps in found.values()}) == [3, 5, 9]
    assert widths[0] == len(rows)
    assert widths[-1] < widths[2] < widths[0]


def test_capture_needs_a_gpu():
    with pytest.raises(ValueError, match="capture: got 'always' with a model on cpu"):
        engine_of("llama", EngineConfig(capture="always"))


@pytest.mark.parametrize(
    ("choice", "device", "dtype", "expected"),
    [
        ("auto", "cpu", torch.float32, "sdpa"),
        ("auto", "cuda", torch.bfloat16, "triton"),
        ("auto", "cuda", torch.float64, "sdpa"),
        ("sdpa", "cuda", torch.bfloat16, "sdpa"),
        ("triton", "cpu", torch.float32, "triton"),
    ],
)
def test_decode_attention_is_chosen_by_what_is_there(choice, device, dtype, expected, monkeypatch):
    monkeypatch.setattr(decode, "refusal", lambda device, dtype: "too wide" if dtype == torch.float64 else None)
    assert decode_kernel(choice, torch.device(device), dtype) == expected


def test_our_decode_kernel_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="decode_attention: got 'triton', .*float64"):
        decode_kernel("triton", torch.device("cpu"), torch.float64)


def test_flash_attention_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="decode_attention: got 'flash' with torch.float32 on cpu"):
        decode_kernel("flash", torch.device("cpu"), torch.float32)
