"""The engine on a GPU: captured steps against the CPU, reuse of graphs, fallback, memory."""

from __future__ import annotations

import pytest
import torch

from gircse import GIRCSE
from gircse.engine import Engine, EngineConfig, varlen
from gircse.engine.body import FusedDecoder, StockDecoder
from gircse.engine.decode import has_flash_attention
from gircse.lm.causal_lm import CausalLM
from tests.engine.test_engine import LENGTHS, K, relative_error, rows_of
from tests.tiny_models import CONFIGS, MORE_CONFIGS, tiny_model, tiny_tokenizer


def engine_on_gpu(name: str, config: EngineConfig | None = None, dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(CausalLM.from_model(tiny_model(name, dtype=dtype).cuda()), config)


@pytest.mark.filterwarnings("ignore:the engine runs the decoder layers of GPT2LMHeadModel itself")
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("name", [*CONFIGS, *MORE_CONFIGS])
def test_captured_steps_equal_the_cpu(name: str, attention: str) -> None:
    expected_engine = Engine(CausalLM.from_model(tiny_model(name)))
    engine = engine_on_gpu(name, EngineConfig(capture="always", decode_attention=attention))
    for lengths, seed in ((LENGTHS, 0), ((50, 2, 130), 1), (LENGTHS[:4], 2)):
        rows = rows_of(lengths, seed=seed, prefix=9)
        assert relative_error(engine.states(rows, K).cpu(), expected_engine.states(rows, K)) <= 1e-3
        assert relative_error(engine.states(rows, 0).cpu(), expected_engine.states(rows, 0)) <= 1e-3
    assert engine.report().graphs
    assert isinstance(engine._decoder, StockDecoder if name == "gpt2" else FusedDecoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "phi3"])
def test_our_decoder_rounds_no_more_than_the_stock_one(name: str, dtype: torch.dtype) -> None:
    rows = rows_of(LENGTHS, prefix=9)
    exact = Engine(CausalLM.from_model(tiny_model(name, dtype=torch.float64))).states(rows, K)
    ours, stock = (
        relative_error(
            engine_on_gpu(name, EngineConfig(fused_kernels=how), dtype).states(rows, K).cpu().double(), exact
        )
        for how in ("always", "never")
    )
    assert ours <= 2 * stock


@pytest.mark.filterwarnings("error:prefill pads")
@pytest.mark.parametrize("size", [8, 64, 96, 128, 256])
def test_packed_attention_runs(size: int) -> None:
    for dtype, groups in ((torch.bfloat16, 7), (torch.float16, 1)):
        assert varlen._is_right(torch.device("cuda", 0), dtype, groups, size)


@pytest.mark.filterwarnings("error:short prefills are not captured")
def test_a_short_prefill_is_captured_and_the_step_counted() -> None:
    """The second batch of a bucket is captured, the third replayed with other texts."""
    engine, eager = (engine_on_gpu("qwen2", EngineConfig(capture=c), torch.bfloat16) for c in ("always", "never"))
    for seed, lengths in enumerate(((9, 4, 12), (8, 3, 11), (12, 2, 10), (5, 5, 13))):
        rows = rows_of(lengths, seed=seed)
        for k in (0, K):
            assert relative_error(engine.states(rows, k), eager.states(rows, k)) <= 3e-2
    (captured,) = set(engine._runner._prefills._graphs.values())
    assert captured is not None
    (cost,) = engine.report().steps
    assert cost.launches <= 9 * engine.lm.config.num_hidden_layers + 6


def test_fusing_takes_no_memory() -> None:
    model = tiny_model("llama", hidden_size=512, intermediate_size=2048).cuda()
    engine = Engine(CausalLM.from_model(model))
    before = torch.cuda.memory_allocated()
    engine._read_model()
    assert isinstance(engine._decoder, FusedDecoder)
    assert torch.cuda.memory_allocated() - before < 1 << 18  # tables of rotary values; a layer's weights are 16 MiB


def test_a_graph_serves_every_number_of_steps_and_every_length_of_its_bucket() -> None:
    engine = engine_on_gpu("llama", EngineConfig(capture="always", reuse_prefix=False))
    eager = engine_on_gpu("llama", EngineConfig(capture="never", reuse_prefix=False))
    for steps in (1, 20, 5):
        for lengths in ((3, 9, 1), (20, 1, 14), (7, 7, 7, 7)):
            rows = rows_of(lengths, seed=steps)
            assert relative_error(engine.states(rows, steps), eager.states(rows, steps)) <= 1e-5
    assert len(engine.report().graphs) == 1
    assert engine.report().graph_bytes >= 0


def test_nothing_waits_for_the_device_between_prompt_and_result() -> None:
    engine, rows = engine_on_gpu("llama", EngineConfig(capture="always")), rows_of((9, 9))
    engine.states(rows, 3)  # captured
    batch_runner = engine._decode

    def guarded(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return batch_runner(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._decode = guarded  # type: ignore[method-assign]
    engine.states(rows, 20)


def test_weights_changed_in_place_and_moved_count() -> None:
    model = GIRCSE(tiny_model("llama").cuda(), tiny_tokenizer())
    before = torch.from_numpy(model.encode(["abc"]))
    with torch.no_grad():
        model.causal_lm.embed_weight.mul_(1.5)
    changed = torch.from_numpy(model.encode(["abc"]))
    assert not torch.allclose(before, changed, atol=1e-4)
    model.double().float()  # the same values elsewhere in memory
    torch.testing.assert_close(torch.from_numpy(model.encode(["abc"])), changed, atol=1e-5, rtol=0)


def test_a_step_that_cannot_be_captured_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = engine_on_gpu("llama", EngineConfig(fused_kernels="never")), rows_of((3, 9))
    expected = engine_on_gpu("llama", EngineConfig(capture="never")).states(rows, 3)
    step = FusedDecoder.step

    def synchronising(self, kv, token, state):
        step(self, kv, token, state)
        token.sum().item()

    engine.states(rows, 0)  # with the step as it is, the decoder is chosen
    monkeypatch.setattr(FusedDecoder, "step", synchronising)
    with pytest.warns(UserWarning, match="cannot be captured"):
        states = engine.states(rows, 3)
    assert relative_error(states, expected) <= 1e-5
    assert engine.report().not_captured is not None


def test_settled_rows_shrink_the_bucket() -> None:
    engine, rows = engine_on_gpu("llama", EngineConfig(capture="always")), rows_of(LENGTHS)
    full, found = engine.states(rows, 9), {}

    def settled(states):
        done = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        done[: len(states) // 2] = states.shape[1] == 3
        return done

    def keep(chosen, states, counts):
        found.update({row: steps[:n] for row, steps, n in zip(chosen, states, counts.tolist(), strict=True)})

    engine.run(rows, 9, keep, settled=settled)
    for row, steps in found.items():
        assert relative_error(steps, full[row, : len(steps)]) <= 1e-4
    assert len({rows for rows, _ in engine.report().graphs}) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_text_whatever_its_batch(dtype: torch.dtype) -> None:
    rows = rows_of(LENGTHS, prefix=6)
    together = engine_on_gpu("llama", dtype=dtype).states(rows, K).float().mean(1)
    alone = engine_on_gpu("llama", EngineConfig(max_rows=1), dtype=dtype).states(rows, K).float().mean(1)
    assert torch.cosine_similarity(together, alone).min() >= 0.9999


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen3", "gemma2", "gemma3"])
def test_our_decoder_gives_the_states_of_the_model_s_own(name: str) -> None:
    rows = rows_of(LENGTHS, prefix=6)
    ours = engine_on_gpu(name, EngineConfig(fused_kernels="always"))
    stock = engine_on_gpu(name, EngineConfig(fused_kernels="never"))
    for num_steps in (0, K):
        assert relative_error(ours.states(rows, num_steps), stock.states(rows, num_steps)) <= 1e-4
    assert ours.report().steps[0].launches < stock.report().steps[0].launches


@pytest.mark.skipif(not has_flash_attention(), reason="needs flash-attn")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_flash_attention_gives_the_same(name: str) -> None:
    rows = rows_of(LENGTHS)
    flash = engine_on_gpu(name, EngineConfig(decode_attention="flash"), torch.bfloat16).states(rows, K).float()
    sdpa = engine_on_gpu(name, EngineConfig(decode_attention="sdpa"), torch.bfloat16).states(rows, K).float()
    assert torch.cosine_similarity(flash.mean(1), sdpa.mean(1)).min() >= 0.999


def test_a_compiled_step_is_captured_as_well() -> None:
    rows = rows_of((3, 9, 1))
    expected = engine_on_gpu("llama").states(rows, 4)
    got = engine_on_gpu("llama", EngineConfig(capture="always", compile=True)).states(rows, 4)
    assert relative_error(got, expected) <= 1e-4


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = engine_on_gpu("llama"), rows_of(LENGTHS * 4)
    expected = engine.states(rows, 3)
    run_batch = Engine._run_batch

    def scarce(self, batch, *rest):
        if len(batch.rows) > 6:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return run_batch(self, batch, *rest)

    monkeypatch.setattr(Engine, "_run_batch", scarce)
    with pytest.warns(UserWarning, match="batches are halved"):
        states = engine.states(rows, 3)
    assert relative_error(states, expected) <= 1e-5


def test_autocast_around_it_changes_nothing() -> None:
    """Captured under autocast or replayed under it: half precision would be off by 1e-3 and more."""
    rows = rows_of((3, 9, 1), prefix=6)
    expected = engine_on_gpu("llama").states(rows, 4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        engine = engine_on_gpu("llama", EngineConfig(capture="always"))
        inside = engine.states(rows, 4)
    for found in (inside, engine.states(rows, 4)):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) <= 1e-5
