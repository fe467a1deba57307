"""float64 all the way: stock norms and softmaxes compute in float32, whatever comes in."""

from __future__ import annotations

import pytest
import torch


def keep_float64(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone float64 stays float64."""
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def patched_to(self, *args, **kwargs):
        if self.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return self
        return to(self, *args, **kwargs)

    def patched_softmax(input, *args, **kwargs):
        if input.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(input, *args, **kwargs)

    patch.setattr(torch.Tensor, "to", patched_to)
    patch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))
    patch.setattr(torch.nn.functional, "softmax", patched_softmax)
