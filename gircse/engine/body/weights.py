"""Linear layers of one input as one product, without a second copy of their weights.

`fuse` moves the weights of the layers into one buffer, of which each parameter then is a part. The parameters stay the
same objects with the same values, so the stock forward pass, optimizers, merging and saving go on as before. Each part
has a storage of its own, because safetensors and accelerate take tensors of one storage for one tied weight, and
accelerate then saves only the first of them. The buffer lives as long as one of its parts. Code that gives a parameter
new memory (`to`, a merge by PEFT) ends the fusion; the engine then finds that the weights have moved and fuses again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gircse.lm.lora import FusedLora

# address of a buffer -> its storage, which this does not keep alive
_BUFFERS: dict[int, StorageWeakRef] = {}


class Projection:
    """Linear layers of one input: x [T, D] -> their outputs side by side, [T, sum of widths].

    It keeps the layers only. So when their parameters get new memory, the old one is free.

    Args:
        layers: all with a bias or all without.
        adapters: of adapters that work on some of them without being merged, those that read this input together.
    """

    def __init__(self, layers: Sequence[nn.Linear], adapters: FusedLora | None = None) -> None:
        self._layers = tuple(layers)
        stops = list(accumulate(len(layer.weight) for layer in layers))
        own = {id(layer): slice(stop - len(layer.weight), stop) for layer, stop in zip(layers, stops, strict=True)}
        self._adapters = [
            (shared, [own[id(layer.get_base_layer())] for layer in shared.layers])
            for shared in (adapters.inputs if adapters is not None else ())
            if id(shared.layers[0].get_base_layer()) in own
        ]

    def __call__(self, x: Tensor) -> Tensor:
        y = self._base(x)
        for shared, columns in self._adapters:
            products = shared.products
            assert products is not None
            t = F.linear(x, products.a)
            for own, b, ranks in zip(columns, products.b, products.columns, strict=True):
                y[:, own].addmm_(t[:, ranks], b.T)
        return y

    def _base(self, x: Tensor) -> Tensor:
        weights, biases = [layer.weight for layer in self._layers], [layer.bias for layer in self._layers]
        weight, bias = joined(weights), None if biases[0] is None else joined(biases)
        if weight is None or (bias is None and biases[0] is not None):
            return torch.cat([F.linear(x, layer.weight, layer.bias) for layer in self._layers], dim=-1)
        return F.linear(x, weight, bias)


def joined(parameters: Sequence[Tensor]) -> Tensor | None:
    """The parameters as one tensor on the same memory, or None where they do not follow each other in a buffer."""
    first = parameters[0]
    if len(parameters) == 1:
        return first
    known, end = _BUFFERS.get(first.data_ptr()), first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != end:
            return None
        end += parameter.nbytes
    storage = None if known is None else torch.UntypedStorage._new_with_weak_ptr(known.cdata)
    if storage is None:
        return None
    shape = (sum(map(len, parameters)), *first.shape[1:])
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, shape, first.stride())


def fuse(layers: Sequence[nn.Linear]) -> bool:
    """Makes the weights, and the biases, of the layers neighbours in memory; false where they are so already.

    For the time of the call one more copy of these layers' weights exists. No other thread may compute with them at
    that time, as with `nn.Module.to`.
    """
    moved = False
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if parameters[0] is None or joined(parameters) is not None:
            continue
        # In inference mode the new tensors could not be trained any more.
        # DLPack exports from the current device.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(parameters[0]):
            buffer = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
                parameter.data = torch.from_dlpack(part)  # a storage of its own, which keeps the buffer
        for address in [address for address, known in _BUFFERS.items() if known.expired()]:
            del _BUFFERS[address]
        _BUFFERS[buffer.data_ptr()] = StorageWeakRef(buffer.untyped_storage())
        moved = True
    return moved
