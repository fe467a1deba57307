from __future__ import annotations

from pathlib import Path

import pytest

import tests.fuzz.profiles  # noqa: F401  (registers them, so that --hypothesis-profile knows their names)
from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package")
def model() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model. Nothing may write into it."""
    folder = tmp_path_factory.mktemp("base")
    GIRCSE(tiny_model("llama"), tiny_tokenizer()).save_pretrained(folder)
    return folder
