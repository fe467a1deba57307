"""Real model shapes with random weights: speed and memory depend on the shape alone, so nothing need be downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Standard deviation of the random models' logits, set by the gain of the last norm. Trained models' soft tokens have an
# entropy of 2 to 6 nats (docs/method.md §10); the default initialisation would give log V, 11, an average of all rows
# in which most mistakes cancel.
_LOGIT_STD = 3.0


@dataclass(frozen=True)
class Shape:
    """One published model.

    Attributes:
        architecture: `transformers` model type.
        settings: its published config.json, as far as it decides the computation.
        parameters: published number of parameters, a tied matrix once.
    """

    architecture: str
    settings: dict[str, Any] = field(hash=False)
    parameters: int

    def config(self, layers: int | None = None) -> PretrainedConfig:
        """The config, cut to the first `layers` decoder layers."""
        settings = dict(self.settings)
        if layers is not None:
            check_layers(layers, settings["num_hidden_layers"])
            settings["num_hidden_layers"] = layers
        return AutoConfig.for_model(self.architecture, **settings)


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


SHAPES = {
    "smollm2-135m": Shape(
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(100_000.0),
            "tie_word_embeddings": True,
        },
        134_515_008,
    ),
    "qwen2.5-0.5b": Shape(
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1_000_000.0),
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1_000_000.0),
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "mistral-7b": Shape(
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10_000.0),
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "llama-3.2-1b": Shape(
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(
                500_000.0,
                rope_type="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
}


def random_model(
    config: PretrainedConfig, *, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> PreTrainedModel:
    """A causal LM of that config with random weights, made directly in `dtype` on `device`, in eval mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    norm = getattr(model.base_model, "norm", None)  # the decoder's last one
    if norm is not None:
        nn.init.constant_(norm.weight, _LOGIT_STD / (config.initializer_range * math.sqrt(config.hidden_size)))
    return model.eval()


def pretrained_model(
    name_or_path: str, *, dtype: torch.dtype, device: str | torch.device, layers: int | None = None
) -> PreTrainedModel:
    """A local folder's or hub name's causal LM with its own weights, in eval mode."""
    config = pretrained_config(name_or_path, layers)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, config=config, dtype=dtype)
    moved: Any = model
    return moved.to(device).eval()


def pretrained_config(name_or_path: str, layers: int | None = None) -> PretrainedConfig:
    """Its config, cut to the first `layers` decoder layers."""
    config = AutoConfig.from_pretrained(name_or_path)
    if layers is not None:
        check_layers(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        config.num_hidden_layers = layers
    return config


def check_layers(layers: int, available: int) -> None:
    """Raises ValueError unless 1 <= layers <= available."""
    if not 1 <= layers <= available:
        raise ValueError(f"layers: got {layers}, expected 1 to {available}, the depth of this model")


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without storage: for counting parameters."""
    return random_model(config, dtype=dtype, device="meta")
