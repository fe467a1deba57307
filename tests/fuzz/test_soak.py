"""The engine for three thousand steps: memory stays flat, nothing grows, and the last result is bitwise the first."""

from __future__ import annotations

import gc
import random
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated things that are only looked at
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.fixture
def own() -> GIRCSE:
    return GIRCSE(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer()).eval()


def test_three_thousand_steps_in_flat_memory(own):
    calls, steps, traced_calls = 60, 50, 2

    def encode(times: int) -> np.ndarray:
        for _ in range(times):
            found = own.encode("a text", num_steps=steps)
        return found

    first = encode(1)
    encode(19)
    tensors, before = live_tensors(), resident()
    encode(calls - 20 - 2 * traced_calls)
    grown = resident() - before
    assert grown < 4 * MIB, f"{grown} bytes"
    # Python's own objects, call by call: tracing is slow, so only at the end
    tracemalloc.start()
    try:
        encode(traced_calls)
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        last = encode(traced_calls)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    assert grown < MIB // 8, f"{grown} bytes of Python objects in {traced_calls * steps} steps"
    assert live_tensors() <= tensors
    np.testing.assert_array_equal(last, first)


def test_batches_of_every_size_do_not_grow_what_is_kept(own):
    """Rows, lengths, K and instructions change from call to call: buffers grow to the largest, and no further."""
    draw = random.Random(0)
    calls = [
        ([f"{'x' * draw.randint(0, 60)}{i}" for i in range(draw.randint(1, 24))], draw.choice([0, 1, 3, 8]), i % 3)
        for i in range(16)
    ]

    def once() -> None:
        draw.shuffle(calls)
        for texts, steps, kind in calls:
            own.encode(texts, num_steps=steps, instruction="x" * kind)

    once()  # buffers grow
    once()  # and everything has been kept that is kept
    engine = own._engine
    assert engine is not None
    kept, tensors = engine.report(), live_tensors()
    once()
    assert own._engine is engine
    assert engine.report() == kept
    assert live_tensors() <= tensors + 2  # masks of the last batch


def test_what_is_kept_by_size_of_batch_is_limited(own, monkeypatch):
    monkeypatch.setattr("gircse.engine.pool._MAX_VIEWS", 6)
    monkeypatch.setattr("gircse.engine.step.MAX_PASSES", 5)
    texts = ["x" * (1 + 20 * (i % 4)) for i in range(12)]
    expected = []
    for rows in range(1, 13):
        expected.append(own.encode(texts[rows - 1], num_steps=2))
        np.testing.assert_allclose(own.encode(texts[:rows], num_steps=2), expected, atol=1e-5)
        assert len(own._engine._pool._views) <= 6
        assert len(own._engine._runner._passes) <= 5
