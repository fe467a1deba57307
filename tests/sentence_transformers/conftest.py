from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny causal LM with its tokenizer, as a plain transformers folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
