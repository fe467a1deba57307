"""LoRA folded in for inference and taken out bitwise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig

from gircse import GIRCSE
from tests.lm.test_rollout import with_lora
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["soft tokens", "a", "the quick brown fox"]


@pytest.fixture
def model():
    return GIRCSE(with_lora(tiny_model("llama")), tiny_tokenizer()).eval()


def weights(model):
    """As they lie in memory; a state dict leaves the merge out."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def adapted(*names, seed=0):
    """With adapters that change embeddings much; the first one is active."""
    base = with_lora(tiny_model("llama"))
    for name in names:
        base.add_adapter(name, base.peft_config["default"])
    torch.manual_seed(seed)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return GIRCSE(base, tiny_tokenizer()).eval()


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


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("whole", [True, False], ids=["GIRCSE", "base"])
def test_weights_that_are_loaded_while_merged_count(whole):
    """As if they had been loaded before: in the next encoding, and after `train` took the adapter out."""
    model, other = adapted(), adapted(seed=1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "base_layer" in name:
                parameter.mul_(1.5)
    expected, apart = other.encode(TEXTS), weights(other)
    model.merge_adapter()
    assert np.abs(model.encode(TEXTS) - expected).max() > 1e-2
    (model if whole else model.base).load_state_dict(state_of(other if whole else other.base))
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    assert model._merged is not None
    model.train()
    model.eval()
    assert_same(weights(model), apart)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_a_state_dict_has_the_adapter_by_itself():
    model = adapted()
    expected = state_of(model)
    model.merge_adapter()
    assert_same(state_of(model), expected)
    assert not torch.equal(*(w[NAME] for w in (weights(model), expected)))  # merged all the same


NAME = "base.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def switched(model):
    model.base.set_adapter("other")


def edited(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(-2)


def rescaled(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.parametrize("change", [switched, edited, rescaled])
def test_another_state_of_the_adapter_is_merged_anew(change):
    model, fresh = adapted("other"), adapted("other")
    change(fresh)
    expected, before = fresh.encode(TEXTS), weights(fresh)
    model.merge_adapter()
    assert np.abs(model.encode(TEXTS) - expected).max() > 1e-2
    change(model)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)


def test_a_merged_adapter_can_be_switched_off_for_a_while():
    model = adapted()
    with model.base.disable_adapter():
        expected = model.encode(TEXTS)
    model.merge_adapter()
    merged = model.encode(TEXTS)
    with model.base.disable_adapter():
        np.testing.assert_array_equal(model.encode(TEXTS), expected)
    np.testing.assert_array_equal(model.encode(TEXTS), merged)


def test_a_merged_weight_that_was_overwritten_is_named():
    model = adapted()
    model.merge_adapter()
    with torch.no_grad():
        model.get_parameter(NAME).mul_(2)
    model.encode(TEXTS)  # the weights are what they are
    with pytest.raises(
        RuntimeError, match=r"weight of .*layers\.0\.self_attn\.q_proj was overwritten while an adapter"
    ):
        model.train()


def test_an_adapter_that_peft_unloaded_stays_in_the_weights():
    model = adapted()
    model.merge_adapter()
    expected = model.encode(TEXTS)
    model.base = model.base.merge_and_unload()
    model.train()
    model.eval()
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


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
