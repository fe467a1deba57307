"""Which weights of a model train, and in which precision."""

from __future__ import annotations

import torch
from torch import nn


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
    """Casts what trains of PEFT's adapters in half precision to float32, as PEFT's own entrances do and transformers'
    `add_adapter` does not: at a usual learning rate an update is below half a unit in the last place of most weights.

    In place, so that an optimizer that has them already trains the same parameters. -> whether there were any.
    """
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    half = [
        parameter
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
        and parameter.dtype in (torch.float16, torch.bfloat16)
        and not name.startswith("base_layer.")
    ]
    for parameter in half:
        parameter.data = parameter.data.float()
    return bool(half)
