from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # The kernels then run on CPU tensors, in Triton's interpreter. It is chosen when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_downcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock norms and softmaxes compute in float32; inside this fixture float64 stays float64."""
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def patched_to(self, *args, **kwargs):
        if self.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return self
        return to(self, *args, **kwargs)

    def patched_softmax(input, *args, **kwargs):
        if input.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(input, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", patched_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))
    monkeypatch.setattr(torch.nn.functional, "softmax", patched_softmax)
