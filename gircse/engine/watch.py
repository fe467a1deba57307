"""Whether a model is still the one that was read: its modules, where its weights lie, its hooks and its adapters.

A captured graph contains addresses of weights and the factors of adapters, and the engine's own decoder body contains
what it read off the layers. Each call of the engine asks whether that still holds. `model.parameters()` walks all
modules by name, which takes a millisecond; here the dictionaries of the modules are listed once, and a call compares
their contents, which takes tens of microseconds.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from gircse.lm.adapter import adapters_at_work


class ModelWatch:
    """Tells whether a model has changed since it was last asked.

    Seen are: another module, parameter or buffer; a weight that lies elsewhere or has another dtype; a forward hook; a
    `forward` that was set on an instance; an adapter that was merged, switched or scaled. New values in the old place
    are no change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tree: list[nn.Module | None] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._seen: list[Any] | None = None

    def changed(self) -> bool:
        """Whether the model has changed since the last call; true at the first one. A caller that moves weights itself
        calls this afterwards, and no later call tells it of that."""
        before = self._seen
        if before is None or [*chain.from_iterable(map(dict.values, self._children))] != self._tree:
            self._list()
            before = None
        self._seen = self._look()
        return before != self._seen

    def _list(self) -> None:
        """Lists what `_look` compares. The children of all modules are listed too, because a module that is replaced
        makes the lists old."""
        modules = list(self._model.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._tree = [*chain.from_iterable(map(dict.values, self._children))]
        self._instances = [vars(module) for module in modules]
        self._tensors = [d for module in modules for d in (module._parameters, module._buffers)]
        self._hooks = [d for module in modules for d in (module._forward_hooks, module._forward_pre_hooks)]
        self._adapted = [module for module in modules if hasattr(module, "merged_adapters")]

    def _look(self) -> list[Any]:
        tensors: Any = chain.from_iterable(map(dict.values, self._tensors))  # type: ignore[arg-type]
        return [
            [(tensor.data_ptr(), tensor.dtype) for tensor in tensors if tensor is not None],
            [own.get("forward") for own in self._instances],
            [*chain.from_iterable(self._hooks)],
            [adapters_at_work(layer) for layer in self._adapted],
        ]
