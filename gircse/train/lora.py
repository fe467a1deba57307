"""The model of a run: a frozen base with LoRA adapters in float32 on it, fresh ones or those of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gircse.lm.adapter import quiet_peft
from gircse.lm.base_fingerprint import check_base
from gircse.lm.config import GircseConfig
from gircse.lm.load import load_pretrained, with_adapter
from gircse.lm.lora import fuse_lora
from gircse.lm.prompts import DEFAULT_TEMPLATE
from gircse.model import GIRCSE
from gircse.ops.head_facts import vocabulary_layers
from gircse.train.checkpointing import enable_checkpointing
from gircse.train.config import TrainConfig
from gircse.train.ranks import Ranks
from gircse.train.run_config import LORA_TARGETS, RunConfig


def trainable_model(config: TrainConfig, model: GIRCSE | None = None, *, ranks: Ranks | None = None) -> GIRCSE:
    """The base of `config.model` (or of `model`), frozen, with LoRA adapters in float32 on it.

    The adapters are fresh, or those of `config.adapter`. With `config.fsdp` the base is loaded on the CPU, from where
    `gircse.train.fsdp.shard_layers` distributes it.

    Raises:
        ValueError: the base has an adapter already, the adapter does not fit, or layers cannot be adapted; the head is
            trained and gets no gradient in any step.
    """
    ranks = ranks or Ranks(torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if model is None and not (config.model or config.adapter):  # transformers would read the current folder
        raise ValueError("model: got none, expected a folder, a hub name or a model in memory")
    if model is None:
        base, tokenizer, saved = _load(config, ranks)
    else:
        base, tokenizer, saved = model.base, model.tokenizer, GircseConfig()
    adapted = model is None and config.adapter is not None
    if hasattr(base, "peft_config") and not adapted:
        raise ValueError(
            f"model: got {config.model or type(base).__name__} with an adapter on it, expected a plain base model; to "
            "train an adapter further, name its folder as adapter"
        )
    if config.adapter is None:
        base = add_lora(base, config)
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
    head = vocabulary_layers(trained.causal_lm.model)[0]
    if config.max_soft_token_gradient == 0 and any(p.requires_grad for p in head.parameters()):
        raise ValueError(
            "soft_token_gradient: got 0 and an adapter on the model's head, which only soft tokens reach, expected a "
            "factor > 0"
        )
    enable_checkpointing(trained, config)
    fuse_lora(trained.base)
    return trained


def add_lora(base: nn.Module, config: RunConfig) -> Any:
    """`base` with fresh LoRA adapters; everything else of it is frozen."""
    from peft import get_peft_model

    with quiet_peft():
        return get_peft_model(base, lora_config(base, config))


def lora_config(base: nn.Module, config: RunConfig) -> Any:
    """PEFT's `LoraConfig` of a run on `base`: by the settings, or that of `config.adapter`."""
    from peft import LoraConfig, PeftConfig

    if isinstance(config, TrainConfig) and config.adapter is not None:
        saved = PeftConfig.from_pretrained(config.adapter)
        saved.inference_mode = False  # PEFT saves it as True, which would freeze the adapter
        return saved
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(base, config.lora_targets),
        task_type="CAUSAL_LM",
    )


def lora_targets(base: nn.Module, wanted: Sequence[str] = LORA_TARGETS) -> list[str] | str:
    """The names of the layers to adapt.

    Of the default names those that `base` has are taken, or "all-linear" where it has none. Other names are taken as
    they are.

    Raises:
        ValueError: the model has no layer of a name, or a layer of that name has no weight matrix.
    """
    layers = {name: _layers_named(base, name) for name in wanted}
    if tuple(wanted) == LORA_TARGETS:
        return [name for name in wanted if layers[name]] or "all-linear"
    if missing := [name for name in wanted if not layers[name]]:
        raise ValueError(f"lora_targets: the model has no layer named {', '.join(missing)}")
    for name in wanted:
        if other := next((layer for layer in layers[name] if not _has_matrix(layer)), None):
            raise ValueError(f"lora_targets: {name} is a {type(other).__name__}, expected linear layers")
    return list(wanted)


def _load(config: TrainConfig, ranks: Ranks) -> tuple[Any, Any, GircseConfig]:
    """Base, tokenizer and saved config. With `config.adapter` the base has the adapter on it."""
    if not ranks.first:  # one progress bar is enough
        from transformers.utils import logging

        logging.disable_progress_bar()
    return load_pretrained(
        config.model or (config.adapter or ""),
        adapter=config.adapter if config.model else None,
        dtype=config.dtype,
        device="cpu" if config.fsdp else ranks.device,
        attn_implementation=None,
        trust_remote_code=False,
        quantization=config.quantization,
        is_trainable=True,
    )


def _layers_named(base: nn.Module, name: str) -> list[nn.Module]:
    """The layers whose whole path is `name` or ends with it, which is how PEFT compares."""
    return [layer for path, layer in base.named_modules() if path == name or path.endswith(f".{name}")]


def _has_matrix(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, (nn.Linear, nn.Embedding, Conv1D))
