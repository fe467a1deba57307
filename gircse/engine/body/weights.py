"""Linear layers of one input as one product, without a second copy of their weights.

`fuse` moves the weights of the layers into one buffer and makes the parameters views of it. The parameters stay the
same objects with the same values, so the stock forward pass, optimizers, merging and saving go on as before. Code that
gives a parameter new memory (`to`, a merge by PEFT) ends the fusion; the engine then finds that the weights have moved
and fuses again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection:
    """Linear layers of one input: x [T, D] -> their outputs side by side, [T, sum of widths].

    It keeps the layers only. So when their parameters get new memory, the old one is free.

    Args:
        layers: all with a bias or all without.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = tuple(layers)
        self._width = sum(layer.out_features for layer in layers)
        self._whole = len(layers) == 1 or (
            _adjacent([layer.weight for layer in layers])
            and (layers[0].bias is None or _adjacent([layer.bias for layer in layers]))
        )

    def __call__(self, x: Tensor) -> Tensor:
        first = self._layers[0]
        if not self._whole:
            return torch.cat([F.linear(x, layer.weight, layer.bias) for layer in self._layers], dim=-1)
        if len(self._layers) == 1:
            return F.linear(x, first.weight, first.bias)
        weight, bias = first.weight, first.bias
        # The view reaches beyond the first layer's weight, over those behind it in the buffer.
        weight = weight.as_strided((self._width, weight.shape[1]), weight.stride())
        return F.linear(x, weight, None if bias is None else bias.as_strided((self._width,), bias.stride()))


def fuse(layers: Sequence[nn.Linear]) -> bool:
    """Makes the weights, and the biases, of the layers neighbours in memory; false where they are so already.

    For the time of the call one more copy of these layers' weights exists. No other thread may compute with them at
    that time, as with `nn.Module.to`.
    """
    moved = False
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if len(parameters) == 1 or parameters[0] is None or _adjacent(parameters):
            continue
        # In inference mode the new tensors could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
                parameter.data = part
        moved = True
    return moved


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other in one storage."""
    storage, offset = tensors[0].untyped_storage().data_ptr(), tensors[0].storage_offset()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != offset:
            return False
        offset += tensor.numel()
    return True
