"""Real model shapes with random weights: speed and memory depend on the shape alone, so nothing need be downloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(architecture: str, parameters: int, sizes: Sequence[int], eps: float, tied: bool, **more: Any) -> Shape:
    """`sizes`: V, D, I of the MLP, layers, heads, heads of keys and values, positions, base of the rotary angles."""
    rope = {"rope_type": "default", "rope_theta": float(sizes[-1]), **more.pop("rope_parameters", {})}
    settings = dict(zip(_SIZES, sizes, strict=False))
    return Shape(
        architecture, {**settings, "rms_norm_eps": eps, "rope_parameters": rope, "tie_word_embeddings": tied, **more},
        parameters,
    )  # fmt: skip


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
SHAPES = {
    "smollm2-135m": _shape("llama", 134_515_008, (49152, 576, 1536, 30, 9, 3, 8192, 100_000), 1e-5, True),
    "qwen2.5-0.5b": _shape("qwen2", 494_032_768, (151936, 896, 4864, 24, 14, 2, 32768, 1_000_000), 1e-6, True),
    "qwen2.5-7b": _shape("qwen2", 7_615_616_512, (152064, 3584, 18944, 28, 28, 4, 131072, 1_000_000), 1e-6, False),
    "mistral-7b": _shape(
        "mistral", 7_241_732_096, (32000, 4096, 14336, 32, 32, 8, 32768, 10_000), 1e-5, False, sliding_window=4096
    ),
    "llama-3.2-1b": _shape(
        "llama",
        1_235_814_400,
        (128256, 2048, 8192, 16, 32, 8, 131072, 500_000),
        1e-5,
        True,
        head_dim=64,
        rope_parameters=_LLAMA3_ROPE,
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
