"""LoRA folded into the base for inference, and taken out again bitwise."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gircse.lm.forking import rewriting_weights

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Weight(NamedTuple):
    """A base weight under an adapter: what it was before the merge, on the host, and the sum of its bits after it."""

    layer: Any
    name: str
    parameter: nn.Parameter
    original: Tensor
    merged_bits: int

    def is_overwritten(self) -> bool:
        """By somebody else than PEFT, which takes one adapter out by itself before another one is set."""
        cast = self.parameter.dtype != self.original.dtype
        return self.layer.merged and not cast and _bits(self.parameter) != self.merged_bits


class MergedAdapter:
    """A PEFT model whose active adapters are merged, and what its weights were before.

    PEFT unmerges by subtraction, which does not give back the same bits; so the originals are kept, on the host.
    Meanwhile `load_state_dict` takes the adapter out first, `state_dict` gives the weights without it, and `refresh`
    merges anew what was loaded, edited, switched on or off. Whoever calls holds `rewriting_weights`.
    """

    def __init__(self, base: Any) -> None:
        """
        Raises:
            ValueError: the adapter was merged by somebody else, or cannot be merged (one on a tied matrix, or with
                numbers that are not finite).
        """
        self._base = base
        self._weights: list[_Weight] = []
        self._handles: list[Any] = []
        self._merge()

    def refresh(self) -> None:
        """Makes the merged weights those of the adapters as they are now. Cheap where nothing was changed."""
        if self._adapters() != self._merged_adapters:
            self.undo()
            self._merge()

    def undo(self) -> None:
        """Puts the weights back that were there before the merge.

        Raises:
            RuntimeError: a merged weight was overwritten: neither its old value nor the new one is that of the base.
        """
        if overwritten := [weight for weight in self._present() if weight.is_overwritten()]:
            weight = overwritten[0]
            name = next(name for name, module in self._base.named_modules() if module is weight.layer)
            raise RuntimeError(
                f"base: {weight.name} of {name} was overwritten while an adapter was merged into it, expected it as it "
                "was; call unmerge_adapter() before you write to base weights"
            )
        self._restore()

    def close(self) -> None:
        """`undo` for good."""
        self.undo()
        self._forget_hooks()

    @torch.no_grad()
    def _merge(self) -> None:
        self._forget_hooks()
        layers = adapted_layers(self._base)
        if any(layer.merged for layer in layers):
            raise ValueError("base: its adapter is merged already; call base.unmerge_adapter() first")
        holders = Counter(id(p) for module in self._base.modules() for p in module._parameters.values())
        if any(holders[id(p)] > 1 for layer in layers for p in layer.get_base_layer().parameters()):
            raise ValueError(
                "base: its adapter cannot be merged: it changes one of two layers that share a matrix (tied head and "
                "table), and folded in it would change both"
            )
        if not all(layer.disable_adapters for layer in layers):
            self._fold_in(layers)
        self._layers, self._parameters = layers, [p for layer in layers for p in _own_parameters(layer)]
        self._merged_adapters = self._adapters()
        for layer in layers:
            self._handles.append(layer.register_load_state_dict_pre_hook(self._before_load))
            # PyTorch writes on this hook that it is a public one, which a method does not take
            self._handles.append(layer.register_state_dict_post_hook(partial(self._with_originals)))

    def _fold_in(self, layers: list[Any]) -> None:
        self._weights = [
            _Weight(layer, name, parameter, parameter.detach().to("cpu", copy=True), 0)
            for layer in layers
            for name, parameter in layer.get_base_layer().named_parameters()
        ]
        try:
            if hasattr(self._base, "merge_adapter"):
                self._base.merge_adapter(safe_merge=True)
            else:  # layers that transformers' `add_adapter` put into the model
                for layer in layers:
                    layer.merge(safe_merge=True)
        except BaseException as error:  # half of the layers may be merged by now
            self._restore()
            if isinstance(error, ValueError):
                raise ValueError(f"base: its adapter cannot be merged: {error}") from error
            raise
        self._weights = [weight._replace(merged_bits=_bits(weight.parameter)) for weight in self._weights]

    @torch.no_grad()
    def _restore(self) -> None:
        present = self._present()
        for layer in dict.fromkeys(weight.layer for weight in present):
            if layer.merged:
                layer.unmerge()
        for weight in present:
            weight.parameter.copy_(weight.original)
        self._weights = []

    def _present(self) -> list[_Weight]:
        """Without the layers that somebody has taken out of the model: `merge_and_unload` keeps what is merged."""
        layers = set(adapted_layers(self._base)) if self._weights else set()
        return [weight for weight in self._weights if weight.layer in layers]

    def _adapters(self) -> list[tuple]:
        """Which adapters are at work in each layer, how strongly, and the versions of their weights, which count what
        is written in place, unless through `.data` or made in inference mode."""
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._parameters]
        return [adapters_at_work(layer) for layer in self._layers] + versions

    def _before_load(self, *_: Any) -> None:
        """What is loaded next are weights without the adapter. A hook of every adapted layer: the first undoes all."""
        with rewriting_weights():
            self._restore()

    def _with_originals(self, layer: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """A state dict holds the adapter by itself: with the merged weights beside it, it would count twice."""
        for weight in self._weights:
            key = f"{prefix}base_layer.{weight.name}"
            if weight.layer is layer and key in state_dict:
                state_dict[key] = weight.original

    def _forget_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _bits(parameter: Tensor) -> int:
    """The sum of a tensor's bits as integers: exact in any order, on any device; nearly any edit changes it."""
    return int(parameter.detach().view(_BITS[parameter.itemsize]).sum(dtype=torch.int64))


def _own_parameters(layer: Any) -> list[nn.Parameter]:
    """The adapters' weights of a layer."""
    base = set(layer.get_base_layer().parameters())
    return [parameter for parameter in layer.parameters() if parameter not in base]


def adapters_at_work(layer: Any) -> tuple:
    """Which adapters of a layer count, and by what factor."""
    scaling = getattr(layer, "scaling", None)
    factors = tuple(scaling.items()) if isinstance(scaling, dict) else ()
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), factors


def adapted_layers(base: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
