from __future__ import annotations

import pytest

import tests.fuzz.profiles  # noqa: F401  (registers them, so that --hypothesis-profile knows their names)
from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package")
def model() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()
