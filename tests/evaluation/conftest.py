from __future__ import annotations

import pytest

from gircse import GIRCSE
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package")
def model() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()


@pytest.fixture
def encoded(model, monkeypatch) -> list[list[str]]:
    """The texts of every encoding pass from here on."""
    passes: list[list[str]] = []
    stream, encode = model.encode_stream, model.encode

    def encode_stream(texts, **options):
        passes.append(list(texts))
        return stream(passes[-1], **options)

    def encode_all(texts, **options):
        passes.append(list(texts))
        return encode(passes[-1], **options)

    monkeypatch.setattr(model, "encode_stream", encode_stream)
    monkeypatch.setattr(model, "encode", encode_all)
    return passes
