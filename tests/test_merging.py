"""LoRA folded in for inference and taken out bitwise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig

from gircse import GIRCSE
from tests.test_rollout import with_lora
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["soft tokens", "a", "the quick brown fox"]


@pytest.fixture
def model():
    return GIRCSE(with_lora(tiny_model("llama")), tiny_tokenizer()).eval()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_merging_changes_nothing_but_the_weights(model):
    expected, before = model.encode(TEXTS), weights(model)
    model.merge_adapter()
    model.merge_adapter()  # a second time: nothing
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    name = next(name for name in before if "q_proj.base_layer.weight" in name)
    assert not torch.equal(weights(model)[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_bitwise(dtype):
    model = GIRCSE(with_lora(tiny_model("llama", dtype=dtype)), tiny_tokenizer()).eval()
    before, expected = weights(model), model.encode(TEXTS)
    model.merge_adapter()
    model.encode(TEXTS)
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert_same(weights(model), before)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_training_takes_the_adapter_out(model):
    before = weights(model)
    model.merge_adapter()
    model.encode(TEXTS)  # eval inside: stays merged
    assert model._merged is not None
    model.train()
    assert_same(weights(model), before)
    assert model.training


def test_saving_a_merged_model_saves_the_same_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "apart")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "apart" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_from_pretrained_merges_on_request(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    lora = with_lora(tiny_model("llama"))
    lora.save_pretrained(tmp_path / "adapter")
    load = {"name_or_path": tmp_path / "base", "adapter": tmp_path / "adapter"}
    apart = GIRCSE.from_pretrained(**load)
    merged = GIRCSE.from_pretrained(**load, merge_adapter=True)
    assert merged._merged is not None
    np.testing.assert_allclose(merged.encode(TEXTS), apart.encode(TEXTS), atol=1e-5)


def test_without_an_adapter_nothing_happens():
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    before = weights(model)
    model.merge_adapter()
    assert_same(weights(model), before)


def test_an_adapter_merged_by_somebody_else_is_refused(model):
    model.base.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        model.merge_adapter()


def test_an_adapter_that_is_not_finite_is_refused_and_nothing_changes(model):
    with torch.no_grad():
        [p for n, p in model.named_parameters() if "lora_B" in n][-1].fill_(float("nan"))
    before = weights(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    after = weights(model)
    assert all(torch.equal(after[n], before[n]) for n in before if "lora" not in n)
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_copies_of_a_merged_model_are_merged(model):
    model.merge_adapter()
    np.testing.assert_array_equal(copy.deepcopy(model).encode(TEXTS), model.encode(TEXTS))
    np.testing.assert_allclose(model.encode(TEXTS, devices=["cpu", "cpu"]), model.encode(TEXTS), atol=1e-5)


def test_an_adapter_on_one_of_two_tied_layers_is_refused():
    """Folded in it would change the other layer as well."""
    tied = tiny_model("llama-tied")
    tied.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"]))
    model = GIRCSE(tied, tiny_tokenizer()).eval()
    before, expected = weights(model), model.encode(TEXTS)
    with pytest.raises(ValueError, match="two layers that share a matrix"):
        model.merge_adapter()
    assert_same(weights(model), before)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_an_adapter_on_head_and_table_is_merged():
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()
    model.base.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head", "embed_tokens"]))
    expected, before = model.encode(TEXTS), weights(model)
    model.merge_adapter()
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)
