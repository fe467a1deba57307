"""4- and 8-bit bases: the error without bitsandbytes, and the config that transformers gets with it."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from gircse.lm import load as loading
from gircse.lm import quantized_base
from gircse.lm.quantized_base import quantization_config
from gircse.train.config import TrainConfig
from gircse.train.lora import trainable_model
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_what_is_missing_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(quantized_base, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"quantization: got 'nf4'.*pip install bitsandbytes accelerate"):
        quantization_config("nf4", torch.bfloat16)
    with pytest.raises(ValueError, match="quantization: got 'int3', expected one of 'nf4', 'int8'"):
        quantization_config("int3", torch.bfloat16)
    with pytest.raises(ValueError, match="quantization: got 'int3'"):
        TrainConfig(quantization="int3")


@pytest.fixture
def installed(monkeypatch):
    """transformers asks for bitsandbytes' version, no more, before a model is loaded."""
    version = importlib.metadata.version
    monkeypatch.setattr(quantized_base, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.49.0" if n == "bitsandbytes" else version(n))


@pytest.mark.usefixtures("installed")
def test_the_config_of_transformers():
    four = quantization_config("nf4", torch.float16)
    assert four.load_in_4bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert quantization_config("int8", torch.float16).load_in_8bit


@pytest.mark.usefixtures("installed")
def test_training_loads_its_base_with_it(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        return tiny_model("llama"), {"missing_keys": set()}

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    trainable_model(TrainConfig(model=str(tmp_path), quantization="nf4", device="cpu"))
    assert asked["quantization_config"].load_in_4bit
    assert asked["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert asked["device_map"] == {"": torch.device("cpu")}
    trainable_model(TrainConfig(model=str(tmp_path), device="cpu"))
