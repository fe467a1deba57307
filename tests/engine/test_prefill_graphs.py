"""Captured prefills without a GPU: what a graph would replay is run again with another batch of the bucket in its
buffers. It must be the same operations on the same memory, and give what an ordinary prefill gives."""

from __future__ import annotations

import pytest
import torch

from gircse.engine import prefill_graphs, varlen
from gircse.engine.body.decoder import StockDecoder
from gircse.engine.body.probe import fused_decoder
from gircse.engine.pool import KVPool
from gircse.engine.prefill import PrefillPass
from gircse.engine.prefill_graphs import PrefillGraphs, _bucket
from gircse.lm.causal_lm import CausalLM
from tests.capture_guard import CaptureGuard
from tests.engine.test_varlen import operator  # noqa: F401
from tests.tiny_models import tiny_model

ROWS, SLOTS = 6, 64


class Graph:
    """Its replay runs the function under a guard."""

    def __init__(self, run):
        self.run, self.calls = run, []
        run()

    def replay(self):
        with CaptureGuard() as guard:
            self.run()
        self.calls.append(guard.calls)


def texts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_one_graph_serves_every_batch_of_its_bucket(name, operator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    lm = CausalLM.from_model(tiny_model(name, dtype=torch.float64))
    decoder, graphs, made = fused_decoder(lm, "sdpa"), PrefillGraphs(), []

    def capture(run):
        made.append(Graph(run))
        return made[-1]

    pools = [KVPool(ROWS * SLOTS) for _ in range(2)]
    batches = [(0, texts_of(12, 9, 4)), (0, texts_of(12, 9, 5)), (2, texts_of(11, 11)), (3, texts_of(20, 5, 3, seed=3))]
    with torch.no_grad():
        for start, texts in batches:
            found = graphs.run(capture, decoder, pools[0], ROWS, SLOTS, start, texts, lm.device)
            expected = decoder.prefill(PrefillPass(pools[1], ROWS, SLOTS, start, texts, None, lm.device))
            if found is None:
                assert not made
                continue
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            for row, text in enumerate(texts, start):
                for ours, theirs in zip(pools[0].layer(1, ROWS, SLOTS), pools[1].layer(1, ROWS, SLOTS), strict=True):
                    torch.testing.assert_close(ours[row, :, : len(text)], theirs[row, :, : len(text)])
    assert all(tensor.isfinite().all() for tensor in pools[0].tensors())
    assert len(made) == 1
    assert len(made[0].calls) == 3
    assert made[0].calls[0] == made[0].calls[1] == made[0].calls[2]


@pytest.mark.parametrize("fault", ["stock", "padded", "many tokens"])
def test_what_is_not_captured(fault):
    """The second batch of a bucket is captured, unless attention pads, as it does on a CPU."""
    lm = CausalLM.from_model(tiny_model("llama"))
    decoder = StockDecoder(lm) if fault == "stock" else fused_decoder(lm, "sdpa")
    graphs, pool, attempts = PrefillGraphs(), KVPool(2 * 2048), []
    texts = texts_of(1000, 100) if fault == "many tokens" else texts_of(5, 3)

    def capture(run):
        attempts.append(1)
        run()

    with torch.no_grad():
        found = [graphs.run(capture, decoder, pool, 2, 2048, 0, texts, lm.device) for _ in range(4)]
    assert found == [None] * 4
    assert len(attempts) == (fault == "padded")


def test_a_capture_that_fails_is_tried_once_and_warned_of():
    lm = CausalLM.from_model(tiny_model("llama"))
    decoder, graphs = fused_decoder(lm, "sdpa"), PrefillGraphs()

    def capture(run):
        raise RuntimeError("operation not permitted\nmore")

    arguments = decoder, KVPool(64), 1, 64, 0, [[5]], lm.device
    assert graphs.run(capture, *arguments) is None
    with pytest.warns(UserWarning, match="short prefills are not captured.*RuntimeError: operation not permitted$"):
        assert graphs.run(capture, *arguments) is None
    assert graphs.run(pytest.fail, *arguments) is None


def test_buckets_and_their_number(monkeypatch):
    """Beyond a number of graphs no other is captured; those that are there go on."""
    assert [_bucket(n) for n in (1, 16, 17, 100, 128, 129, 256, 1000)] == [16, 16, 32, 128, 128, 256, 256, 1024]
    monkeypatch.setattr(prefill_graphs, "MAX_GRAPHS", 2)
    graphs, lm = PrefillGraphs(), CausalLM.from_model(tiny_model("llama"))
    decoder, pool = fused_decoder(lm, "sdpa"), KVPool(128)
    monkeypatch.setattr(decoder, "prefill", lambda kv: torch.zeros(2, 4))
    for _ in range(3):
        found = [graphs.run(Graph, decoder, pool, 1, slots, 0, [[5]], lm.device) for slots in (64, 80, 96)]
    assert [states is not None for states in found] == [True, True, False]
    assert graphs.captured == 2
