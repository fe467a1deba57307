"""LoRA in few kernels: the layers of an adapted model that read the same input compute together.

PEFT computes each adapter of each layer by itself, in the adapter's float32, with a dropout mask of its own.
`fuse_lora` gives PEFT's layers another `forward`: the first layer that is called with an input computes the outputs of
all layers that read it (`gircse.lm.lora_products`), with one dropout mask, and the others take theirs. The weights stay
in PEFT's modules, so that saving, merging, optimizers and checkpoints see nothing of it. The products have the dtype of
the base and read copies of the weights in that dtype, which are written again when a weight has changed, that is once
an optimizer step.

A layer whose adapter is merged or disabled, or that is called under autocast or with more than its input, runs PEFT's
own forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gircse.lm.adapter import adapted_layers
from gircse.lm.lora_products import Drop, GradientEntry, LoraProducts, Piece, Products, drop
from gircse.ops.autocast import autocast_dtype

# Layers of one module that read the same input, in every architecture that has them by these names.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_lora(model: nn.Module) -> FusedLora | None:
    """Lets the plain LoRA layers of `model` compute together from now on; those that do so already stay as they are.

    Layers of other kinds (DoRA and other variants, LoRA with a bias, quantized or trained base layers, embeddings) keep
    PEFT's forward, and a warning counts them.

    A weight has changed where its autograd version or its storage has. A fused optimizer of PyTorch counts no version:
    call `torch.autograd.graph.increment_version` of the weights after its step, as `gircse.train.update.adamw` does.

    Returns:
        The layers by inputs; None where the model has no LoRA layer that can.
    """
    if (fused := fused_lora(model)) is not None:
        return fused
    adapted = adapted_layers(model)
    groups = [group for group in _groups(model) if group]
    if others := len(adapted) - sum(map(len, groups)):
        warnings.warn(
            f"{others} of {len(adapted)} adapted layers train by PEFT's own, slower products: they are no plain LoRA "
            "(without a bias or a variant such as DoRA) on a frozen linear layer",
            stacklevel=2,
        )
    return FusedLora(groups) if groups else None


def fused_lora(model: nn.Module) -> FusedLora | None:
    """What `fuse_lora` has made of the model; None where it was not called."""
    forwards = (layer.__dict__.get("forward") for layer in adapted_layers(model))
    return next((forward.fused for forward in forwards if isinstance(forward, _Forward)), None)


def unfuse_lora(model: nn.Module) -> None:
    """Gives the layers PEFT's forward back."""
    for layer in adapted_layers(model):
        layer.__dict__.pop("forward", None)


def refresh_lora(model: nn.Module, *, always: bool = False) -> None:
    """Copies the weights that have changed into the matrices of the products, in place. A forward does this by itself.

    Args:
        always: copy all weights, so that a graph that is captured inside reads those of each replay.
    """
    if (fused := fused_lora(model)) is not None:
        fused.refresh(always=always)


class FusedLora:
    """The adapted layers of a model that compute together.

    Attributes:
        inputs: one entry for each input that adapted layers read.
        drop: computes their dropout.
    """

    def __init__(self, groups: Sequence[Sequence[Any]]) -> None:
        self.inputs = tuple(SharedInput(layers) for layers in groups)
        self.drop: Drop = drop
        self._kept: _Kept | None = None
        for shared in self.inputs:
            for index, layer in enumerate(shared.layers):
                layer.forward = _Forward(self, shared, index)
        self.refresh()

    @torch.no_grad()
    def refresh(self, *, always: bool = False) -> None:
        """Copies the weights that have changed into the matrices of the products, in place."""
        stale = [copy for shared in self.inputs for copy in shared.stale_copies(always=always)]
        if stale:
            copies, weights, factors = map(list, zip(*stale, strict=True))
            torch._foreach_copy_(copies, torch._foreach_mul(weights, factors))

    def output(self, shared: SharedInput, index: int, x: Tensor) -> Tensor | None:
        """Of layer `index`; None where PEFT must compute it. The outputs of the other layers are kept for the calls
        with the same tensor that follow."""
        version = 0 if x.is_inference() else x._version
        kept, self._kept = self._kept, None
        if kept is None or kept[:3] != (id(x), version, shared) or index not in kept.outputs:
            products = shared.products
            if products is None or products.a.dtype != x.dtype:
                return None
            if not shared.is_current():
                self.refresh()
            kept = _Kept(id(x), version, shared, dict(enumerate(shared.outputs(x, products, self.drop))), x)
        output = kept.outputs.pop(index)
        if kept.outputs:
            self._kept = kept
        return output


class _Kept(NamedTuple):
    """Outputs that no layer has taken yet. The input is kept with them, so that no other tensor gets its id."""

    input_id: int
    version: int
    shared: SharedInput
    outputs: dict[int, Tensor]
    x: Tensor


class SharedInput:
    """Adapted layers that read the same input.

    Attributes:
        layers: PEFT's layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self._products: Products | None = None
        self._matrices: dict[tuple, tuple[Tensor, list[Tensor]]] = {}
        self._built_for: list[Any] | None = None
        self._modules: list[Any] = []  # that hold the weights A and then B of all pieces
        self._dropout: nn.Module = nn.Identity()
        self._copied: list[Any] | None = None
        self._entry: tuple[Any, Tensor] | None = None

    @property
    def products(self) -> Products | None:
        """The stacked matrices of the active adapters; None where PEFT must compute. Those of each choice of
        adapters stay where they are, because a captured graph may read them. `FusedLora.refresh` writes the weights."""
        if any(layer.disable_adapters or layer.merged for layer in self.layers):
            return None
        base = self.layers[0].get_base_layer().weight
        wanted = [base.dtype, base.device, base.requires_grad]
        wanted += [(*layer.active_adapters, *layer.scaling.items()) for layer in self.layers]
        if self._built_for != wanted:
            self._build(base.dtype, base.device)
            self._built_for = wanted
        return self._products

    def outputs(self, x: Tensor, products: Products, drop: Drop) -> tuple[Tensor, ...]:
        """Of all layers."""
        dropout = self._dropout
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return LoraProducts.apply(x, p, drop, products, self._gradient_entry() if torch.is_grad_enabled() else None)

    def is_current(self) -> bool:
        """Whether the matrices hold the weights of now."""
        return self._copied == _versions(self._weights())

    def stale_copies(self, *, always: bool = False) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Copies that do not hold the weights of now, each with its weight and factor. They count as written then."""
        products = self.products
        if products is None or (self.is_current() and not always):
            return
        weights, count = self._weights(), len(products.pieces)
        self._copied = _versions(weights)
        for piece, a, b in zip(products.pieces, weights[:count], weights[count:], strict=True):
            yield products.a[piece.rows], a, 1.0
            yield products.b[piece.layer][:, piece.columns], b, piece.scaling

    def _gradient_entry(self) -> Tensor:
        """One for all calls until the weights or the CUDA stream change: autograd runs its backward on the stream that
        it was made on, and a stream that is captured may not wait for another."""
        weights = self._weights()
        stream = torch.cuda.current_stream(weights[0].device) if weights[0].is_cuda else None
        key = (self._copied, [weight.requires_grad for weight in weights], stream)
        if self._entry is None or self._entry[0] != key:
            self._entry = None  # first, so that the weights' own nodes are made on the new stream, too
            self._entry = key, GradientEntry.apply(*weights)
        return self._entry[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_entry": None}  # no copy may lead to the weights of this model

    def _weights(self) -> list[Tensor]:
        return [module.weight for module in self._modules]

    def _build(self, dtype: torch.dtype, device: torch.device) -> None:
        """Stacks the adapters that are active now."""
        self._products = self._copied = None
        pieces: list[Piece] = []
        columns, modules_a, modules_b, dropouts = [], [], [], []
        stop = 0
        for index, layer in enumerate(self.layers):
            start = stop
            for name in (name for name in layer.active_adapters if name in layer.lora_A):
                rows = slice(stop, stop + layer.r[name])
                own = slice(rows.start - start, rows.stop - start)
                pieces.append(Piece(index, rows, own, layer.scaling[name]))
                modules_a.append(layer.lora_A[name])
                modules_b.append(layer.lora_B[name])
                dropouts.append(layer.lora_dropout[name])
                stop = rows.stop
            columns.append(slice(start, stop))
        self._modules = modules_a + modules_b
        if not pieces or not all(map(_is_plain, self.layers)) or len({getattr(d, "p", 0.0) for d in dropouts}) > 1:
            return
        self._dropout = dropouts[0]
        key = (
            dtype,
            device,
            *((own.stop, *layer.active_adapters) for layer, own in zip(self.layers, columns, strict=True)),
        )
        if key not in self._matrices:
            with torch.inference_mode(False):
                a = torch.empty(stop, modules_a[0].in_features, dtype=dtype, device=device)
                b = [
                    torch.empty(layer.out_features, own.stop - own.start, dtype=dtype, device=device)
                    for layer, own in zip(self.layers, columns, strict=True)
                ]
            self._matrices[key] = a, b
        a, b = self._matrices[key]
        self._products = Products([layer.get_base_layer() for layer in self.layers], a, b, columns, pieces)


class _Forward:
    """The `forward` of an adapted layer."""

    def __init__(self, fused: FusedLora, shared: SharedInput, index: int) -> None:
        self.fused, self.shared, self.index = fused, shared, index

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs or torch.compiler.is_compiling()) and autocast_dtype(x) is None:
            output = self.fused.output(self.shared, self.index, x)
            if output is not None:
                return output
        layer = self.shared.layers[self.index]
        return type(layer).forward(layer, x, *args, **kwargs)


def _groups(model: nn.Module) -> Iterator[list[Any]]:
    """The plain LoRA layers, those that read the same input together."""
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if _is_plain(child)}
        for names in _SHARING:
            yield [children.pop(name) for name in names if name in children]
        yield from ([child] for child in children.values())


def _is_plain(layer: Any) -> bool:
    """Whether it is a LoRA layer on a frozen linear layer, and nothing else."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    if type(layer) is not Linear or layer.lora_variant or any(layer.lora_bias.values()):
        return False
    base = layer.get_base_layer()
    return type(base) in (nn.Linear, Conv1D) and not any(p.requires_grad for p in base.parameters())


def _versions(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Change with every write that autograd counts, and with another storage."""
    return [(weight.data_ptr(), weight._version) for weight in weights]
