"""Causal LM folders, PEFT adapters in the official layout, our own folders; what is saved is what is loaded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from gircse import GIRCSE, GircseConfig
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a text", "another, longer text", "x"]


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def lora(model, **options):
    torch.manual_seed(3)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    )


@pytest.fixture
def adapter(base, tmp_path):
    """A plain PEFT LoRA folder, as the official adapters are: no file of ours in it."""
    folder = tmp_path / "adapter"
    from transformers import AutoModelForCausalLM

    lora(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(folder)
    assert not (folder / "gircse_config.json").exists()
    return folder


def test_a_plain_causal_lm(base):
    model = GIRCSE.from_pretrained(base)
    assert model.config == GircseConfig()
    assert not model.training
    assert model.encode(TEXTS).shape == (3, 32)
    assert GIRCSE.from_pretrained(base, num_steps=9).num_steps == 9
    assert GIRCSE.from_pretrained(str(base), dtype="bfloat16").causal_lm.head_weight.dtype == torch.bfloat16


def test_adapter_by_argument_and_by_its_own_folder(base, adapter):
    plain = GIRCSE.from_pretrained(base).encode(TEXTS)
    by_argument = GIRCSE.from_pretrained(base, adapter=adapter)
    by_folder = GIRCSE.from_pretrained(adapter)
    assert isinstance(by_folder.base, PeftModel)
    assert not np.allclose(plain, by_argument.encode(TEXTS), atol=1e-3)
    assert np.array_equal(by_argument.encode(TEXTS), by_folder.encode(TEXTS))


def test_our_folder_keeps_adapter_config_and_tokenizer(base, tmp_path):
    config = GircseConfig(num_steps=3, pooling="weighted", temperature=0.7, prompt_template="{instruction} => {text}")
    from transformers import AutoModelForCausalLM

    model = GIRCSE(lora(AutoModelForCausalLM.from_pretrained(base)), tiny_tokenizer(), config).eval()
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "gircse_config.json",
        "tokenizer.json",
    }
    again = GIRCSE.from_pretrained(folder)
    assert again.config == config
    assert np.array_equal(again.encode(TEXTS, instruction="i"), model.encode(TEXTS, instruction="i"))
    model.save_pretrained(folder)  # over itself
    assert np.array_equal(GIRCSE.from_pretrained(folder).encode(TEXTS), model.encode(TEXTS))


def test_a_whole_model_without_adapter(tmp_path):
    model = GIRCSE(tiny_model("qwen2"), tiny_tokenizer(), GircseConfig(num_steps=2))
    model.save_pretrained(tmp_path / "whole")
    again = GIRCSE.from_pretrained(tmp_path / "whole")
    assert again.num_steps == 2
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_other_files_in_the_folder_stay(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    GIRCSE(tiny_model("llama"), tiny_tokenizer()).save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "keep me"
    assert not list(tmp_path.glob(".*partial"))


def test_a_failed_save_leaves_the_old_folder_untouched(tmp_path, monkeypatch):
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    model.save_pretrained(tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before
    assert not list(tmp_path.glob(".*partial"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="name_or_path.*nowhere"):
        GIRCSE.from_pretrained(tmp_path / "nowhere")


def test_a_missing_adapter_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter.*nowhere"):
        GIRCSE.from_pretrained(base, adapter=tmp_path / "nowhere")


def test_an_adapter_whose_base_is_gone_says_how_to_go_on(adapter):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "/gone/away"
    path.write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"/gone/away, which does not exist.*adapter="):
        GIRCSE.from_pretrained(adapter)


def test_two_adapters_are_refused(adapter):
    with pytest.raises(ValueError, match="is an adapter itself"):
        GIRCSE.from_pretrained(adapter, adapter=adapter)


@pytest.mark.parametrize("other", ["qwen3", "gpt2"])
def test_an_adapter_of_another_model_is_refused(adapter, other, tmp_path):
    folder = tmp_path / other
    model = tiny_model(other) if other == "gpt2" else tiny_model("llama", num_hidden_layers=3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="does not fit"):
        GIRCSE.from_pretrained(folder, adapter=adapter)


def test_prompt_tuning_is_refused(base):
    from transformers import AutoModelForCausalLM

    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        GIRCSE(tuned, tiny_tokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "gircse_config.json"),
        ("[1]", "expected a JSON object"),
        ('{"num_steps": -2}', "num_steps: got -2"),
        ('{"num_steps": true}', "num_steps: got True"),
        ('{"pooling": "max"}', "pooling: got 'max'"),
        ('{"temperature": 0}', "temperature: got 0"),
        ('{"prompt_template": "no place"}', "prompt_template"),
        ('{"steps": 3}', "unknown keys steps"),
    ],
)
def test_a_bad_config_is_named(base, content, message):
    (base / "gircse_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        GIRCSE.from_pretrained(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"dtype": "nonsense"}, "dtype: got 'nonsense'"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: got 'flash_attention_2'"),
    ],
)
def test_bad_options_are_named(base, options, message):
    with pytest.raises(ValueError, match=message):
        GIRCSE.from_pretrained(base, **options)


def test_ops_import_without_transformers():
    import subprocess
    import sys

    code = "import sys, gircse.ops; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
