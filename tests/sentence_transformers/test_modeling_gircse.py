"""The plain modelling file of saved folders: equal to the package, and alone in the world."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

import gircse
from gircse import GIRCSE, GircseConfig
from gircse.lm.causal_lm import position_limit
from gircse.sentence_transformers import GIRCSEModule, modeling_gircse
from tests.lm.test_causal_lm import ROTARY, rotary_model
from tests.tiny_models import CONFIGS, definition, tiny_model, tiny_tokenizer

TEXTS = ["a text", "another, longer text", "", "x", "word " * 9]
TASK = "Sort by topic"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name):
    for config in (
        GircseConfig(num_steps=4),
        GircseConfig(num_steps=3, pooling="weighted", append_eos=True, include_prompt_state=True),
    ):
        ours = GIRCSE(tiny_model(name), tiny_tokenizer(), config).eval()
        settings = json.loads(config.to_json())
        plain = modeling_gircse.GIRCSEModule(
            tiny_model(name, attn=definition(name)), tiny_tokenizer(), **settings
        ).eval()
        st = SentenceTransformer(modules=[plain], device="cpu")
        prompt = plain.format_prompt(TASK)
        for steps in (0, config.num_steps):
            np.testing.assert_allclose(
                st.encode(TEXTS, prompt=prompt, num_steps=steps, return_steps=True),
                ours.encode(TEXTS, instruction=TASK, num_steps=steps, return_steps=True),
                atol=1e-5,
                rtol=0,
            )


@pytest.mark.parametrize("facts", [{"logit_scale": 0.5}, {"logits_scaling": 3.0}])
def test_scaled_logits(facts):
    lm = tiny_model("llama")
    hidden = torch.randn(3, 32)
    stock = modeling_gircse.soft_token(lm, hidden, 0.7)
    for key, value in facts.items():
        setattr(lm.config, key, value)
    factor = facts.get("logit_scale", 1.0) / facts.get("logits_scaling", 1.0)
    expected = torch.softmax(factor * lm.lm_head(hidden) / 0.7, -1) @ lm.get_input_embeddings().weight
    assert torch.allclose(modeling_gircse.soft_token(lm, hidden, 0.7), expected, atol=1e-6)
    assert not torch.allclose(stock, expected, atol=1e-4)


def test_gradients_are_the_rollouts(no_downcast):
    modules = [
        modeling_gircse.GIRCSEModule(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), num_steps=3),
        GIRCSEModule(GIRCSE(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), GircseConfig(num_steps=3))),
    ]
    torch.manual_seed(1)
    weight = torch.randn(len(TEXTS), 3, 32, dtype=torch.float64)
    gradients = []
    for module in modules:
        module.train()
        steps = module(module.preprocess(TEXTS))["step_embeddings"]
        (steps * weight).sum().backward()
        gradients.append({name: p.grad for name, p in module.causal_lm.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-10), name


def test_checkpointing_is_refused():
    module = modeling_gircse.GIRCSEModule(tiny_model("llama"), tiny_tokenizer()).train()
    model = module.causal_lm
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the newer name
    with pytest.raises(RuntimeError, match=r"gradient checkpointing switches off .* gircse.load"):
        module(module.preprocess(TEXTS))


TARGETS = ["q_proj", "v_proj"]
ADAPTERS = {
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rslora": LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, use_rslora=True, lora_bias=True),
    "tokens": LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[40, 71]),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "loha": LoHaConfig(r=4, target_modules=TARGETS),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
}


@pytest.mark.usefixtures("add_adapter")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_is_loaded_whole(base_folder, tmp_path, kind):
    st = gircse.load(base_folder, num_steps=3, device="cpu")
    bare = st.encode(TEXTS)
    st.add_adapter(copy.deepcopy(ADAPTERS[kind]))
    with torch.no_grad():
        for parameter in (p for p in st.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = st.encode(TEXTS)
    assert np.abs(expected - bare).max() > 1e-2
    st.save_pretrained(str(tmp_path / "saved"))
    plain = modeling_gircse.GIRCSEModule.load(str(tmp_path / "saved"))
    again = SentenceTransformer(modules=[plain], device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(gircse.load(tmp_path / "saved").encode(TEXTS), expected, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("add_adapter")
def test_an_adapter_on_the_vocabulary_reaches_the_soft_tokens(base_folder, tmp_path):
    """The plain file and a model with the adapter folded in by peft are the same."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    plain = modeling_gircse.GIRCSEModule.load(str(tmp_path / "adapter"))
    folded = modeling_gircse.GIRCSEModule(adapted.merge_and_unload(), tiny_tokenizer()).eval()
    ours, expected = (SentenceTransformer(modules=[module], device="cpu").encode(TEXTS) for module in (plain, folded))
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("add_adapter")
def test_a_base_inside_the_adapters_folder_and_one_that_is_gone(base_folder, tmp_path):
    st = gircse.load(base_folder, num_steps=3, device="cpu")
    st.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    folder = tmp_path / "saved"
    st.save_pretrained(str(folder))
    shutil.copytree(base_folder, folder / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)  # from wherever it is loaded
    for base, is_there in (("./base", True), ("./gone", False)):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        if is_there:
            plain = SentenceTransformer(modules=[modeling_gircse.GIRCSEModule.load(str(folder))], device="cpu")
            np.testing.assert_allclose(plain.encode(TEXTS), st.encode(TEXTS), atol=1e-5, rtol=0)
        else:
            with pytest.raises(FileNotFoundError, match=r"base model: \./gone does not exist"):
                modeling_gircse.GIRCSEModule.load(str(folder))


@pytest.mark.usefixtures("add_adapter")
def test_saved_after_the_adapter_was_deleted(base_folder, tmp_path):
    plain = modeling_gircse.GIRCSEModule.load(str(base_folder)).eval()
    st = SentenceTransformer(modules=[plain], device="cpu")
    expected = st.encode(TEXTS)
    st.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    st.delete_adapter("default")
    st.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(modules=[modeling_gircse.GIRCSEModule.load(str(tmp_path / "saved"))], device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("add_adapter")
def test_what_is_missing_is_refused(base_folder, tmp_path):
    st = gircse.load(base_folder, device="cpu")
    st.add_adapter(copy.deepcopy(ADAPTERS["dora"]))
    folder = tmp_path / "saved"
    st.save_pretrained(str(folder))
    weights = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in weights if "magnitude" in name)
    save_file({name: w for name, w in weights.items() if name != gone}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"does not fit LlamaForCausalLM: 1 weights missing, 0 .*{re.escape(gone)}"):
        modeling_gircse.GIRCSEModule.load(str(folder))
    save_file({**weights, gone + "x": weights[gone].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"0 weights missing, 1 unexpected.*{re.escape(gone)}x"):
        modeling_gircse.GIRCSEModule.load(str(folder))

    whole = tmp_path / "whole"
    gircse.load(base_folder, device="cpu").save_pretrained(str(whole))
    weights = load_file(whole / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of LlamaForCausalLM, for example model.norm.weight"):
        modeling_gircse.GIRCSEModule.load(str(whole))

    prompt = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    prompt.save_pretrained(tmp_path / "prompt")
    tiny_tokenizer().save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="got an adapter of type PROMPT_TUNING, expected layers in the decoder"):
        modeling_gircse.GIRCSEModule.load(str(tmp_path / "prompt"))


@pytest.mark.smollm2
def test_a_real_model():
    from gircse.demo.smollm2 import smollm2_path

    path = str(smollm2_path())
    texts = ["who wrote the first dictionary?", "Soft tokens are mixtures of embeddings.", ""]
    st = gircse.load(path, num_steps=3, dtype="float32", device="cpu", instruction=TASK)
    ours = GIRCSE.from_pretrained(path, num_steps=3, dtype="float32", device="cpu").encode(texts, instruction=TASK)
    # float64, because the stock float32 products can be off by 5e-5 themselves here
    plain = modeling_gircse.GIRCSEModule.load(path, model_kwargs={"dtype": torch.float64})
    alone = SentenceTransformer(modules=[plain], prompts=st.prompts, device="cpu")
    np.testing.assert_allclose(st.encode_query(texts), ours, atol=1e-5, rtol=0)
    np.testing.assert_allclose(alone.encode_query(texts, num_steps=3), ours, atol=1e-5, rtol=0)


LONELY = """
import json, sys
for name in ("gircse", "gircse_kernels"):
    sys.modules[name] = None  # import raises ImportError
import numpy as np
from sentence_transformers import SentenceTransformer
folders, texts, prompt, output = json.loads(sys.argv[1])
found = {}
for name, folder in folders.items():
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    assert type(model[0]).load.__module__.startswith("transformers_modules."), type(model[0]).load.__module__
    found[name] = model.encode(texts, prompt=prompt)
    found[name + "-steps"] = model.encode(texts, num_steps=2, return_steps=True, normalize_embeddings=True)
    found[name + "-query"] = model.encode_query(texts)
    again = folder + "-again"
    model.save_pretrained(again)
    other = SentenceTransformer(again, trust_remote_code=True, device="cpu")
    assert np.array_equal(other.encode(texts), model.encode(texts))
np.savez(output, **found)
"""


@pytest.mark.usefixtures("add_adapter")
def test_a_folder_without_the_package(tmp_path, base_folder):
    adapted = gircse.load(base_folder, num_steps=3, instruction="Find it", device="cpu")
    adapted.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    gemma = GIRCSE(tiny_model("gemma2"), tiny_tokenizer(), GircseConfig(num_steps=3, pooling="last")).eval()
    whole = SentenceTransformer(modules=[GIRCSEModule(gemma)], device="cpu")
    folders = {}
    for name, st in (("adapted", adapted), ("whole", whole)):
        folders[name] = str(tmp_path / name)
        st.save_pretrained(folders[name])
    prompt = adapted[0].format_prompt(TASK)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = json.dumps([folders, TEXTS, prompt, str(tmp_path / "found.npz")])
    subprocess.run([sys.executable, "-c", LONELY, arguments], cwd=tmp_path, env=environment, check=True)
    found = np.load(tmp_path / "found.npz")
    for name, st in (("adapted", adapted), ("whole", whole)):
        np.testing.assert_allclose(found[name], st.encode(TEXTS, prompt=prompt), atol=1e-5, rtol=0)
        steps = st.encode(TEXTS, num_steps=2, return_steps=True)
        np.testing.assert_allclose(found[f"{name}-steps"], steps, atol=1e-5, rtol=0)
        np.testing.assert_allclose(found[f"{name}-query"], st.encode_query(TEXTS), atol=1e-5, rtol=0)
        again = GIRCSE.from_pretrained(folders[name] + "-again")  # what the plain file saved, the package reads
        np.testing.assert_allclose(again.encode(TEXTS), st.encode(TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_an_adapter_on_head_or_table_is_spoken_with(targets):
    """In the plain file as in the package."""
    base = tiny_model("gemma3")
    ours = GIRCSE(tiny_model("gemma3"), tiny_tokenizer()).eval()
    for model in (base, ours.base):
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    plain = modeling_gircse.GIRCSEModule(base, tiny_tokenizer()).eval()
    features = plain.preprocess(["a text"])
    with torch.no_grad():
        got = plain(features)["sentence_embedding"].numpy()
    np.testing.assert_allclose(got, ours.encode(["a text"]), atol=1e-5)


def test_positions_are_those_of_the_package():
    for kind in ROTARY:
        config = rotary_model(kind).config
        assert modeling_gircse.position_limit(config) == position_limit(config)
