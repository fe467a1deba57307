"""Several threads on one model: each gets, bit for bit, what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = [f"text number {i}, {'and so on ' * (i % 4)}" for i in range(12)]
THREADS = 4


def adapted() -> GIRCSE:
    base = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.5))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return GIRCSE(base, tiny_tokenizer()).eval()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls give, each in a thread of its own, where they all meet; errors are raised by `result`."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_every_way_to_encode_at_once(model):
    options: list[dict[str, Any]] = [
        {"num_steps": 3},
        {"num_steps": 0},
        {"num_steps": 5, "return_steps": True},
        {"num_steps": 3, "instruction": "find it", "batch_size": 2},
        {"num_steps": 3, "instruction": "find it, whatever it is"},
        {"num_steps": "auto", "tolerance": 0.5, "max_steps": 6},
        {"num_steps": 2, "truncate_dim": 7, "normalize": False},
    ]
    calls = [lambda o=o, i=i: model.encode(TEXTS[i:], **o) for i, o in enumerate(options)]
    alone = [call() for call in calls]
    for _ in range(3):
        for found, expected in zip(at_once(*calls), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_streams_that_take_turns_do_not_use_each_others_prefix(model):
    """Their instruction is the same and their texts begin differently: a prefix that the engine keeps would serve the
    other stream too, but with another length, and so other roundings."""
    sources = [TEXTS, [text[::-1] for text in TEXTS], [text.upper() for text in TEXTS]]

    def stream(texts: list[str]):
        return model.encode_stream(texts, instruction="find the text", num_steps=2, window=3)

    alone = [np.stack(list(stream(texts))) for texts in sources]
    turns = zip(*map(stream, sources), strict=True)
    for found, expected in zip(zip(*turns, strict=True), alone, strict=True):
        np.testing.assert_array_equal(np.stack(found), expected)
    together = at_once(*(lambda texts=texts: np.stack(list(stream(texts))) for texts in sources))
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_thread_that_raises_leaves_the_others_and_the_model_alone(model):
    expected = model.encode(TEXTS, num_steps=2)

    def broken() -> None:
        def texts():
            yield from TEXTS[:5]
            raise OSError("the source is gone")

        with pytest.raises(OSError, match="the source is gone"):
            list(model.encode_stream(texts(), num_steps=2, window=2))
        with pytest.raises(TypeError, match="texts\\[1\\]"):
            model.encode(["a", 1])

    calls = [broken, lambda: model.encode(TEXTS, num_steps=2)] * THREADS
    for found in at_once(*calls)[1::2]:
        np.testing.assert_array_equal(found, expected)
    assert not model.training
    np.testing.assert_array_equal(model.encode(TEXTS, num_steps=2), expected)


def test_merging_waits_for_those_who_encode():
    model = adapted()
    apart = model.encode(TEXTS, num_steps=2)
    model.merge_adapter()
    merged = model.encode(TEXTS, num_steps=2)
    model.unmerge_adapter()
    assert not np.array_equal(apart, merged)  # so that a mixture would be seen
    found: list[np.ndarray] = []

    def encode() -> None:
        found.extend(model.encode(TEXTS, num_steps=2) for _ in range(6))

    def merge() -> None:
        for _ in range(8):
            model.merge_adapter()
            model.unmerge_adapter()

    at_once(encode, merge, encode, merge)
    for embeddings in found:
        assert np.array_equal(embeddings, apart) or np.array_equal(embeddings, merged)
    np.testing.assert_array_equal(model.encode(TEXTS, num_steps=2), apart)


def test_training_mode_waits_for_those_who_encode():
    """The adapter's dropout would show if a text were encoded in training mode."""
    model = adapted()
    expected = model.encode(TEXTS, num_steps=2)
    found: list[np.ndarray] = []

    def encode() -> None:
        found.extend(model.encode(TEXTS, num_steps=2) for _ in range(4))

    def switch() -> None:
        for i in range(80):
            model.train(i % 2 == 0)

    def look() -> None:
        for _ in range(2):
            model.inspect(TEXTS[:2], num_steps=2)

    at_once(encode, switch, encode, look)
    for embeddings in found:
        np.testing.assert_array_equal(embeddings, expected)
    model.train()
    at_once(look, encode, look)
    assert model.training


def test_a_tokenizer_that_truncates_is_shared():
    """Every call switches its truncation and padding off."""
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.enable_truncation(max_length=4)
    tokenizer._tokenizer.enable_padding(pad_id=0, pad_token="<eos>")
    model = GIRCSE(tiny_model("llama"), tokenizer).eval()
    texts = [f"{i} " * 40 for i in range(100)]
    expected = model.encode(texts, num_steps=0, max_length=8)
    found = at_once(*[lambda: model.encode(texts, num_steps=0, max_length=8)] * 6)
    for embeddings in found:
        np.testing.assert_array_equal(embeddings, expected)
