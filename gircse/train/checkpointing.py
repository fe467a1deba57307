"""Which layers of a run are computed again in backward instead of keeping their activations."""

from __future__ import annotations

from torch import nn

from gircse.model import GIRCSE
from gircse.train.run_config import RunConfig


def enable_checkpointing(model: GIRCSE, config: RunConfig) -> None:
    """Checkpoints all layers of a model, or the first `config.checkpointed_layers`, if the config has checkpointing.

    Raises:
        ValueError: the model has fewer layers.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        keep_first_checkpoints(model.causal_lm.body, config)


def keep_first_checkpoints(body: nn.Module, config: RunConfig) -> None:
    """Switches checkpointing off in all but the first `config.checkpointed_layers`: backward begins with the last ones,
    and has freed their activations when it computes the others again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    count = config.checkpointed_layers
    if count is None:
        return
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    config.expect("checkpointed_layers", count <= len(layers), f"at most {len(layers)}, all layers")
    for layer in layers[count:]:
        layer.gradient_checkpointing = False
