from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.full_precision import keep_float64
from tests.own_warnings import caused_by_us

if not torch.cuda.is_available():
    # The kernels then run on CPU tensors, in Triton's interpreter. It is chosen when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        from tests.interpreter import replace_once_a_launch

        replace_once_a_launch()

from tests.tiny_models import tiny_model, tiny_tokenizer  # after that choice: transformers may import triton


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_warnings_of_our_making() -> Iterator[None]:
    """Ordinary use is silent: a test fails where a call of ours makes another library warn."""
    with caused_by_us() as found:
        yield
    assert not found, found


@pytest.fixture
def no_downcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock norms and softmaxes compute in float32; inside this fixture float64 stays float64."""
    keep_float64(monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a tiny base model with its tokenizer."""
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
