"""Activation checkpointing that a CUDA graph can hold.

PyTorch's checkpointing saves the generator's state in forward and sets it again where a layer is computed for the
second time, in backward. A graph cannot do that. Here a checkpointed layer keeps the dropout masks of its LoRA layers,
one bit an element, and its second pass takes them in the same order and draws nothing. Masks and states of the first
pass are those of PyTorch's checkpointing. Any other random operator in such a layer raises an error: its second pass
would draw other numbers, and the gradient would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gircse.lm.lora import FusedLora
from gircse.lm.lora_products import Drop, drop, dropout_scale

_GATHER_BITS = sum(1 << 7 * i for i in range(1, 9))  # times eight bytes of 0 or 1: their bits in the highest byte


class RandomOperatorError(RuntimeError):
    """A checkpointed layer draws random numbers for something else than the dropout of LoRA layers."""


@contextmanager
def checkpoints_without_generator(
    body: nn.Module, lora: FusedLora | None, second_pass: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Inside, the checkpointed layers of `body` work as the module says, and their second pass runs in `second_pass()`.

    Raises:
        RandomOperatorError: in either pass.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        masks: list[Tensor] = []
        return _dropping(lora, partial(_draw, masks)), _again(lora, masks, second_pass)

    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    layers: list[Any] = [module for module in body.modules() if getattr(module, "gradient_checkpointing", False)]
    before = [layer._gradient_checkpointing_func for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = function
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = own


@contextmanager
def _again(
    lora: FusedLora | None, masks: list[Tensor], second_pass: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    with second_pass(), _dropping(lora, partial(_repeat, iter(masks))):
        yield


@contextmanager
def _dropping(lora: FusedLora | None, drop: Drop) -> Iterator[None]:
    """Inside, `drop` computes the dropout of `lora`, and nothing else may draw."""
    guard = _NoOtherDraws()

    def allowed(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        guard.open = True
        try:
            return drop(x, p)
        finally:
            guard.open = False

    with guard:
        if lora is None:
            yield
            return
        before, lora.drop = lora.drop, allowed
        try:
            yield
        finally:
            lora.drop = before


def _draw(masks: list[Tensor], x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    dropped, mask = drop(x, p)
    masks.append(packed(mask))
    return dropped, mask


def _repeat(masks: Iterator[Tensor], x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    mask = unpacked(next(masks), x.shape)
    return torch.ops.aten.native_dropout_backward(x, mask, dropout_scale(p)), mask  # x * mask * scale


def packed(mask: Tensor) -> Tensor:
    """A bool tensor of n elements -> uint8 [ceil(n / 8)], one bit an element."""
    flat = F.pad(mask.flatten().view(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(torch.int64) * _GATHER_BITS >> 56).to(torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask that was packed."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = (bits[:, None] >> places & 1).view(torch.bool)
    return mask.flatten()[: shape.numel()].view(shape)


class _NoOtherDraws(TorchDispatchMode):
    """Raises where an operator draws random numbers, unless it is `open`."""

    open = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags and not self.open and _draws(function, args, kwargs):
            raise RandomOperatorError(
                f"{function.overloadpacket} draws random numbers in a checkpointed layer, and a graph cannot draw them "
                "twice"
            )
        return function(*args, **kwargs)


def _draws(function: Any, args: Any, kwargs: Any) -> bool:
    """Attention is a random operator only with dropout."""
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" not in names or given.get("dropout_p", 0.0) > 0
