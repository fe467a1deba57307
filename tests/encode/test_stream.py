"""`encode_stream`: texts of unknown number, in order, in bounded memory, whoever stops first."""

from __future__ import annotations

import gc
import inspect
import resource
import threading
import warnings
import weakref
from itertools import islice

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from gircse import GIRCSE, GircseConfig
from gircse.encode.pipeline import EncodeOptions
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = [f"{i} " + "lorem ipsum dolor "[: i % 17] for i in range(23)]


@pytest.fixture(scope="module")
def model():
    return GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=2))


@pytest.mark.parametrize("window", [1, 5, 23, 1000])
def test_equals_encode_in_order(model, window):
    stream = list(model.encode_stream(iter(TEXTS), window=window))
    np.testing.assert_allclose(np.stack(stream), model.encode(TEXTS), atol=1e-5)


def test_options_are_those_of_encode(model):
    options = dict(inspect.signature(EncodeOptions.of).parameters)
    del options["model"]
    assert options.items() <= dict(inspect.signature(GIRCSE.encode).parameters).items()  # names, defaults and types
    options = {"instruction": "find", "num_steps": 3, "truncate_dim": 8, "normalize": False, "return_steps": True}
    stream = np.stack(list(model.encode_stream(TEXTS, window=7, **options)))
    np.testing.assert_allclose(stream, model.encode(TEXTS, **options), atol=1e-4)
    auto = np.stack(list(model.encode_stream(TEXTS, window=7, num_steps="auto", tolerance=0.05)))
    np.testing.assert_allclose(auto, model.encode(TEXTS, num_steps="auto", tolerance=0.05), atol=1e-5)


def test_no_texts(model):
    assert list(model.encode_stream(iter([]))) == []


def test_reads_at_most_two_windows_ahead(model):
    read = []
    stream = model.encode_stream((read.append(text) or text for text in TEXTS), window=4)
    assert read == []
    for given, _ in enumerate(stream, start=1):
        assert len(read) <= 4 * (-(-given // 4) + 1)


def test_the_source_is_read_in_the_callers_thread(model):
    threads = set()

    def source():
        for text in TEXTS:
            threads.add(threading.get_ident())
            yield text

    list(model.encode_stream(source(), window=5))
    assert threads == {threading.get_ident()}


def test_a_consumer_may_stop_early(model):
    before, closed = threading.active_count(), []

    def source():
        try:
            yield from TEXTS * 100
        finally:
            closed.append(True)

    stream = model.encode_stream(source(), window=4)
    assert len(list(islice(stream, 6))) == 6
    stream.close()
    del stream
    gc.collect()
    assert closed == [True]
    assert threading.active_count() == before
    assert model.encode("still works").shape == (32,)


def test_a_source_that_fails_gives_what_it_gave_first(model):
    def source():
        yield from TEXTS[:10]
        raise OSError("disk gone")

    got = []
    with pytest.raises(OSError, match="disk gone"):
        got.extend(model.encode_stream(source(), window=4))
    np.testing.assert_allclose(np.stack(got), model.encode(TEXTS[:10]), atol=1e-5)


def test_a_text_that_is_none_is_named(model):
    with pytest.raises(TypeError, match=r"texts\[11\]: got NoneType, expected str"):
        list(model.encode_stream([*TEXTS[:11], None], window=4))


def test_cut_texts_are_counted_once(model):
    with pytest.warns(UserWarning, match="5 of 20 texts are longer than max_length=12 tokens") as caught:
        list(model.encode_stream(["x" * 30 if i % 4 == 0 else "y" for i in range(20)], window=3, max_length=12))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("abc", {}, TypeError, "texts: got str, expected an iterable of strings"),
        (7, {}, TypeError, "texts: got int"),
        (["a"], {"window": 0}, ValueError, "window: got 0"),
        (["a"], {"num_steps": -1}, ValueError, "num_steps: got -1"),
    ],
)
def test_bad_input_is_named_before_anything_is_read(model, texts, options, error, message):
    with pytest.raises(error, match=message):
        model.encode_stream(texts, **options)


def adapted():
    base = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    base.add_adapter("other", LoraConfig(r=4, target_modules=["v_proj", "down_proj"]))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return GIRCSE(base, tiny_tokenizer(), GircseConfig(num_steps=2)).eval()


def scaled_in_place(model):
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.mul_(1.5)


def scaled_past_the_version_counter(model):
    for parameter in model.base.parameters():
        parameter.data.mul_(1.5)


CHANGES = {
    "set_adapter": lambda model: model.base.set_adapter("other"),
    "load_state_dict": lambda model: model.load_state_dict({n: 1.5 * t for n, t in model.state_dict().items()}),
    "in place": scaled_in_place,
    ".data": scaled_past_the_version_counter,
    "merge_adapter": lambda model: model.merge_adapter(),
    "another table": lambda model: model.base.get_base_model().set_input_embeddings(torch.nn.Embedding(131, 32)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_changed_between_windows_counts_from_the_next_one_on(change):
    """Also for the instruction that all texts begin with, whose keys and values are those of one window."""
    model = adapted()
    stream = model.encode_stream(TEXTS, instruction="the same for every text", window=6)
    before = np.stack([next(stream) for _ in range(6)])
    change(model)
    after = np.stack(list(stream))
    fresh = model.encode(TEXTS, instruction="the same for every text")
    np.testing.assert_allclose(after, fresh[6:], atol=1e-5)
    if change is not CHANGES["merge_adapter"]:
        assert np.abs(before - fresh[:6]).max() > 1e-2  # so that a mixture would be seen


class Word(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


def test_texts_and_embeddings_are_let_go(model):
    alive: weakref.WeakSet[Word] = weakref.WeakSet()
    most = 0

    def source():
        for i in range(400):
            word = Word(f"word {i}")
            alive.add(word)
            yield word

    for _ in model.encode_stream(source(), window=16):
        most = max(most, len(alive))
    assert most <= 3 * 16


def test_twenty_thousand_texts_in_flat_memory():
    """Order is checked by content: a text's embedding is that of its number."""
    model = GIRCSE(
        tiny_model("llama", num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=2),
        tiny_tokenizer(),
        GircseConfig(num_steps=1),
    )
    count, kinds = 20_000, 50
    texts = [f"{i:02d}" + "ab" * (i % 5) for i in range(kinds)]
    expected = model.encode(texts)
    peak = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, embedding in enumerate(model.encode_stream((texts[j % kinds] for j in range(count)), window=1024)):
            if i % 997 == 0:
                np.testing.assert_allclose(embedding, expected[i % kinds], atol=1e-5)
            if i == count // 5:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert i == count - 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 10 * 1024  # KiB
    assert torch.is_inference_mode_enabled() is False
