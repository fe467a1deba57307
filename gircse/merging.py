"""LoRA folded into the base for inference, and taken out again bitwise."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


class MergedAdapter:
    """A PEFT model whose active adapters are merged, and what its weights were before.

    PEFT unmerges by subtraction, which does not give back the same bits; so the originals are kept, on the host.
    """

    def __init__(self, base: Any, originals: list[tuple[nn.Parameter, Tensor]]) -> None:
        self._base, self._originals = base, originals

    @classmethod
    @torch.no_grad()
    def merge(cls, base: Any) -> MergedAdapter:
        """
        Raises:
            ValueError: the adapter was merged by somebody else, or cannot be merged (one on a tied matrix, or with
                numbers that are not finite).
        """
        layers = adapted_layers(base)
        if any(layer.merged for layer in layers):
            raise ValueError("base: its adapter is merged already; call base.unmerge_adapter() first")
        holders = Counter(id(p) for module in base.modules() for p in module._parameters.values())
        if any(holders[id(p)] > 1 for layer in layers for p in layer.get_base_layer().parameters()):
            raise ValueError(
                "base: its adapter cannot be merged: it changes one of two layers that share a matrix (tied head and "
                "table), and folded in it would change both"
            )
        originals = [
            (parameter, parameter.detach().to("cpu", copy=True))
            for layer in layers
            for parameter in layer.get_base_layer().parameters()
        ]
        merged = cls(base, originals)
        try:
            if hasattr(base, "merge_adapter"):
                base.merge_adapter(safe_merge=True)
            else:  # layers that transformers' `add_adapter` put into the model
                for layer in layers:
                    layer.merge(safe_merge=True)
        except BaseException as error:  # half of the layers may be merged by now
            merged.undo()
            if isinstance(error, ValueError):
                raise ValueError(f"base: its adapter cannot be merged: {error}") from error
            raise
        return merged

    @torch.no_grad()
    def undo(self) -> None:
        if hasattr(self._base, "unmerge_adapter"):
            self._base.unmerge_adapter()
        else:
            for layer in adapted_layers(self._base):
                layer.unmerge()
        for parameter, original in self._originals:
            parameter.copy_(original)


def adapted_layers(base: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
