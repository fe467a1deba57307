"""PEFT adapters in a model: where they are, which are active, and the precision that they train in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides a warning while PEFT wraps a model: PEFT reads `is_gradient_checkpointing`, a name that transformers has
    replaced, and the user of this package cannot change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def adapted_layers(model: nn.Module) -> list[Any]:
    """The modules that hold an adapter's layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_at_work(layer: Any) -> tuple:
    """Which adapters of a layer count, and by what factor."""
    scaling = getattr(layer, "scaling", None)
    factors = tuple(scaling.items()) if isinstance(scaling, dict) else ()
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), factors


def active_adapter(lm: Any) -> str | None:
    """The name of the adapter that is active in a transformers model; None where the model has none.

    Raises:
        ValueError: several adapters are active, or the model has some and none of them is active.
    """
    configs, layers = getattr(lm, "peft_config", None), adapted_layers(lm)
    if not configs or not layers:
        return None
    active = sorted({name for layer in layers for name in layer.active_adapters if name in configs})
    if len(active) != 1:
        raise ValueError(
            f"base: got {len(active)} active adapters of {', '.join(map(repr, configs))}, expected one to save: "
            "set_adapter(name) of the PEFT model chooses it, add_weighted_adapter makes one of several"
        )
    return active[0]


def check_trainable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: every weight is frozen, so that training would change nothing.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: got frozen weights only, expected some to train; a saved adapter goes on training after "
            "from_pretrained(folder, is_trainable=True)"
        )


def train_in_float32(model: nn.Module) -> bool:
    """Casts the trainable weights of adapters from half precision to float32, and returns whether there were any.

    At a usual learning rate an update is below half a unit in the last place of most weights in half precision. PEFT
    casts in its own entry points; transformers' `add_adapter` does not. The cast is in place, so that an optimizer that
    holds these parameters goes on training them.
    """
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return False
    half = [
        parameter
        for layer in adapted_layers(model)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
        and parameter.dtype in (torch.float16, torch.bfloat16)
        and not name.startswith("base_layer.")
    ]
    for parameter in half:
        parameter.data = parameter.data.float()
    return bool(half)
