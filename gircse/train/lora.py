"""The model of a training run: a frozen base with LoRA adapters in float32 on it, fresh ones or those of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gircse.lm.base_fingerprint import check_base
from gircse.lm.config import GircseConfig
from gircse.lm.load import load_pretrained, with_adapter
from gircse.lm.prompts import DEFAULT_TEMPLATE
from gircse.lm.quiet import quiet_peft
from gircse.model import GIRCSE
from gircse.train.config import LORA_TARGETS, TrainConfig
from gircse.train.ranks import Ranks


def trainable_model(config: TrainConfig, model: GIRCSE | None = None, *, ranks: Ranks | None = None) -> GIRCSE:
    """The base of `config.model` (or of `model`), frozen, with LoRA adapters in float32 on it: fresh ones, or those of
    `config.adapter`; its layers shared out over the processes where `config.fsdp` asks for that.

    Raises:
        ValueError: a base that has an adapter already, one that does not fit, or layers that cannot be adapted.
    """
    ranks = ranks or Ranks(torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if model is None:
        if not ranks.first:
            _quiet()
        base, tokenizer, saved = load_pretrained(
            config.model or (config.adapter or ""),
            adapter=config.adapter if config.model else None,
            dtype=config.dtype,
            device="cpu" if config.fsdp else ranks.device,
            attn_implementation=None,
            trust_remote_code=False,
            quantization=config.quantization,
            is_trainable=True,
        )
        adapted = config.adapter is not None
    else:
        base, tokenizer, saved = model.base, model.tokenizer, GircseConfig()
        adapted = False
    if hasattr(base, "peft_config") and not adapted:
        raise ValueError(
            f"model: got {config.model or type(base).__name__} with an adapter on it, expected a plain base model; to "
            "train an adapter further, name its folder as adapter"
        )
    if config.adapter is None:
        from peft import get_peft_model

        with quiet_peft():
            base = get_peft_model(base, lora_config(base, config))
    else:
        saved = GircseConfig.load(config.adapter) or saved
        if saved.prompt_template != DEFAULT_TEMPLATE:
            raise ValueError(
                f"adapter: {config.adapter} was trained with the prompt template {saved.prompt_template!r}, expected "
                f"{DEFAULT_TEMPLATE!r}, which training writes"
            )
        if not adapted:
            check_base(base, type(base).__name__, config.adapter)
            base = with_adapter(base, config.adapter, is_trainable=True)
    trained = GIRCSE(base, tokenizer, config.gircse_config())
    if config.gradient_checkpointing:
        trained.gradient_checkpointing_enable()
    if config.fsdp:
        from gircse.train.fsdp import shard_layers

        shard_layers(trained, ranks)
    return trained


def lora_config(base: nn.Module, config: TrainConfig) -> Any:
    """PEFT's `LoraConfig` of a run on `base`: by the settings, or that of `config.adapter`."""
    from peft import LoraConfig, PeftConfig

    if config.adapter is not None:
        saved = PeftConfig.from_pretrained(config.adapter)
        saved.inference_mode = False  # as it is saved: with frozen weights
        return saved
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(base, config.lora_targets),
        task_type="CAUSAL_LM",
    )


def lora_targets(base: nn.Module, wanted: Sequence[str] = LORA_TARGETS) -> list[str] | str:
    """The layer names to adapt: of the default ones those that `base` has, "all-linear" where it has none of them;
    other ones as they are.

    Raises:
        ValueError: a name was asked for that the model does not have, or that is no layer of a matrix.
    """
    found = {name: _layers_named(base, name) for name in wanted}
    if tuple(wanted) == LORA_TARGETS:
        return [name for name, layers in found.items() if layers] or "all-linear"
    if missing := [name for name, layers in found.items() if not layers]:
        raise ValueError(f"lora_targets: the model has no layer named {', '.join(missing)}")
    for name, layers in found.items():
        if other := next((layer for layer in layers if not _has_matrix(layer)), None):
            raise ValueError(f"lora_targets: {name} is a {type(other).__name__}, expected linear layers")
    return list(wanted)


def _layers_named(base: nn.Module, name: str) -> list[nn.Module]:
    """As PEFT compares: the whole name, or its last parts."""
    return [layer for path, layer in base.named_modules() if path == name or path.endswith(f".{name}")]


def _has_matrix(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, (nn.Linear, nn.Embedding, Conv1D))


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
