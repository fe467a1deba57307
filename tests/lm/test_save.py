"""What is saved is what is loaded: adapters of any name and on any layer, after they were deleted or folded in, from
another directory; and never with another base than the one they were trained on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gircse import GIRCSE, GircseConfig
from gircse.lm.base_fingerprint import BASE_NAME
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a text", "another, longer text", "x"]
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*embedding layers")


def base_folder(path, name="llama", **overrides):
    tiny_model(name, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def base(tmp_path):
    return base_folder(tmp_path / "base")


def lora(seed=3, targets=("q_proj", "v_proj"), **options):
    torch.manual_seed(seed)
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base)


def wrapped(model):
    return GIRCSE(model, tiny_tokenizer(), GircseConfig(num_steps=3)).eval()


def assert_comes_back(model, folder):
    expected = model.encode(TEXTS)
    model.save_pretrained(folder)
    again = GIRCSE.from_pretrained(folder)
    assert again.num_steps == 3
    assert np.array_equal(again.encode(TEXTS), expected)


def test_an_adapter_of_another_name(base, tmp_path):
    assert_comes_back(wrapped(get_peft_model(loaded(base), lora(), adapter_name="mine")), tmp_path / "peft")
    model = loaded(base)
    model.add_adapter(lora(), adapter_name="mine")
    assert_comes_back(wrapped(model), tmp_path / "transformers")


def test_of_two_adapters_the_active_one(base, tmp_path):
    peft = get_peft_model(loaded(base), lora())
    peft.add_adapter("second", lora(seed=4))
    model, folder = wrapped(peft), tmp_path / "saved"
    for name in ("second", "default"):
        peft.set_adapter(name)
        assert_comes_back(model, folder)
    assert not (folder / "second").exists()


def test_two_active_adapters_are_refused_and_nothing_is_written(base, tmp_path):
    model = loaded(base)
    model.add_adapter(lora(), adapter_name="a")
    model.add_adapter(lora(seed=4), adapter_name="b")
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="got 2 active adapters of 'a', 'b', expected one to save"):
        wrapped(model).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_adapter_that_came_after_wrapping(base, tmp_path):
    for number, put in enumerate((lambda m, c: get_peft_model(m, c), lambda m, c: m.add_adapter(c))):
        model = wrapped(loaded(base))
        before = model.encode(TEXTS)
        put(model.base, lora(targets=["q_proj", "lm_head", "embed_tokens"]))
        assert np.abs(model.encode(TEXTS) - before).max() > 0.01
        assert_comes_back(model, tmp_path / str(number))


def test_a_trained_copy_of_the_head_and_a_tied_base(tmp_path):
    model = wrapped(get_peft_model(loaded(base_folder(tmp_path / "a")), lora(modules_to_save=["lm_head"])))
    with torch.no_grad():
        model.causal_lm.facts().head_weight.mul_(1.5)
    assert_comes_back(model, tmp_path / "copy")
    tied = loaded(base_folder(tmp_path / "b", "llama-tied"))
    assert_comes_back(wrapped(get_peft_model(tied, lora(targets=["q_proj", "lm_head"]))), tmp_path / "tied")


def test_a_resized_table(base, tmp_path):
    model = wrapped(loaded(base))
    model.base.resize_token_embeddings(140, mean_resizing=False)
    model = wrapped(get_peft_model(model.base, lora()))
    assert_comes_back(model, tmp_path / "saved")
    assert GIRCSE.from_pretrained(tmp_path / "saved").causal_lm.embed_weight.shape == (140, 32)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("what", ["deleted", "deleted by transformers", "folded in for good"])
def test_without_its_adapter_the_whole_model_is_saved(name, what, tmp_path):
    """Also into a folder where the adapter was saved before."""
    model = loaded(base_folder(tmp_path / "base", name))
    if what == "deleted by transformers":
        model.add_adapter(lora())
    else:
        model = get_peft_model(model, lora())
    model, folder = wrapped(model), tmp_path / "saved"
    model.save_pretrained(folder)
    if what == "folded in for good":
        model.base.merge_and_unload()
    else:
        model.base.delete_adapter("default")
    model.merge_adapter()  # there is none: nothing happens
    assert_comes_back(model, folder)
    assert not (folder / "adapter_config.json").exists()
    shutil.rmtree(tmp_path / "base")
    GIRCSE.from_pretrained(folder)


def test_a_mixed_peft_model_encodes_and_is_not_half_saved(base, tmp_path):
    plain = get_peft_model(loaded(base), lora())
    mixed = wrapped(get_peft_model(loaded(base), lora(), mixed=True))
    assert np.array_equal(mixed.encode(TEXTS), wrapped(plain).encode(TEXTS))
    with pytest.raises(ValueError, match="got a PeftMixedModel, expected a PeftModel"):
        mixed.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_base_with_a_relative_path(base, tmp_path, monkeypatch):
    """Saved from one directory, loaded from another, in which a folder of that name holds another model."""
    monkeypatch.chdir(tmp_path)
    model = wrapped(get_peft_model(loaded("base"), lora()))
    expected = model.encode(TEXTS)
    model.save_pretrained("saved")
    elsewhere = tmp_path / "elsewhere"
    base_folder(elsewhere / "base", seed=9)
    monkeypatch.chdir(elsewhere)
    assert np.array_equal(GIRCSE.from_pretrained(tmp_path / "saved").encode(TEXTS), expected)
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    monkeypatch.chdir(tmp_path)
    again = GIRCSE.from_pretrained("base")  # what is loaded by a relative path is saved by a whole one
    again = wrapped(get_peft_model(again.base, lora()))
    monkeypatch.chdir(elsewhere)
    assert_comes_back(again, elsewhere / "saved")


def test_a_base_inside_the_saved_folder_moves_with_it(tmp_path):
    folder = tmp_path / "whole"
    model = wrapped(get_peft_model(loaded(base_folder(folder / "base")), lora()))
    expected = model.encode(TEXTS)
    model.save_pretrained(folder)
    folder = folder.rename(tmp_path / "moved")
    assert np.array_equal(GIRCSE.from_pretrained(folder).encode(TEXTS), expected)


def test_the_bases_own_folder_is_refused(base):
    before = sorted(base.iterdir())
    with pytest.raises(ValueError, match="is the base model's own folder"):
        wrapped(get_peft_model(loaded(base), lora())).save_pretrained(base)
    assert sorted(base.iterdir()) == before


@pytest.mark.parametrize("merged", [False, True])
def test_another_base_is_refused(base, tmp_path, merged):
    model = wrapped(get_peft_model(loaded(base), lora()))
    if merged:
        model.merge_adapter()
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    GIRCSE.from_pretrained(saved, dtype="bfloat16")
    other = loaded(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.05)  # fine-tuned
    other.save_pretrained(base)
    with pytest.raises(ValueError, match=r"adapter: .*saved was trained on another model .*up_proj.weight holds other"):
        GIRCSE.from_pretrained(saved)
    with pytest.raises(ValueError, match="trained on another model"):
        GIRCSE.from_pretrained(base, adapter=saved)
    shutil.rmtree(base)
    base_folder(base, "qwen2")
    with pytest.raises(ValueError, match="its model_type is 'qwen2', not 'llama'|holds other numbers"):
        GIRCSE.from_pretrained(saved)
    (saved / BASE_NAME).unlink()  # as the message says
    GIRCSE.from_pretrained(saved)


@pytest.mark.parametrize("content", ["{", "[]", '{"matrices": {}}', '{"model_type": "llama", "matrices": {"a": 3}}'])
def test_a_damaged_fingerprint_is_named(base, tmp_path, content):
    wrapped(get_peft_model(loaded(base), lora())).save_pretrained(tmp_path / "saved")
    content = content.replace('"a"', '"model.embed_tokens.weight"')
    (tmp_path / "saved" / BASE_NAME).write_text(content)
    with pytest.raises(ValueError, match=BASE_NAME):
        GIRCSE.from_pretrained(tmp_path / "saved")
