"""What a CUDA graph forbids, found without a GPU: two consecutive runs must be the same sequence of operations.

A captured run is replayed with the addresses and Python numbers of the time it was captured. So nothing in it may ask
the device for a value, have a shape that depends on values, hand a Python number to an operation that is another one in
the next run, or read memory that is another one in the next run.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_SYNCS = {"aten._local_scalar_dense", "aten.item", "aten.equal", "aten.is_nonzero", "aten.allclose"}
_DATA_DEPENDENT = {
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_dim",
    "aten.repeat_interleave.Tensor",
}


class CaptureError(AssertionError):
    pass


class CaptureGuard(TorchDispatchMode):
    """Records operations with their Python arguments and the outside memory they touch; raises on a synchronisation."""

    def __init__(self):
        super().__init__()
        self.calls, self._made = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in _SYNCS:
            raise CaptureError(f"{name} waits for the device")
        if name in _DATA_DEPENDENT or str(function) in _DATA_DEPENDENT:
            raise CaptureError(f"{name} has a shape that depends on values")
        flat, _ = tree_flatten((args, kwargs or {}))
        if name == "aten.index" and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in flat[1:]):
            raise CaptureError(f"{name} with a boolean mask has a shape that depends on values")
        self.calls.append((name, tuple(self._describe(value) for value in flat)))
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                # keeps it alive, so that no later tensor gets its address
                self._made.setdefault(tensor.untyped_storage().data_ptr(), (len(self._made), tensor))
        return out

    def _describe(self, value):
        """A tensor by where its memory comes from: made in this step (by its number) or outside (by its address)."""
        if not isinstance(value, torch.Tensor):
            return value if isinstance(value, (int, float, bool, str, type(None), torch.dtype)) else str(value)
        address = value.untyped_storage().data_ptr()
        where = ("inside", self._made[address][0]) if address in self._made else ("outside", value.data_ptr())
        return (*where, tuple(value.shape), tuple(value.stride()))


def two_steps(step):
    """The calls of two consecutive steps."""
    with torch.no_grad():  # views in inference mode do not reach a dispatch mode as themselves
        found = []
        for _ in range(2):
            with CaptureGuard() as guard:
                step()
            found.append(guard.calls)
    return found
