from __future__ import annotations

from pathlib import Path

import pytest

from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny base model with its tokenizer, which these tests only read."""
    folder: Path = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(base: str) -> GIRCSE:
    return GIRCSE.from_pretrained(base, merge_adapter=True)
