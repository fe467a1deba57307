"""The GPU suite for tests of it, and a tiny model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.suite_runner import Runner
from tests.tiny_models import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_model("llama-tied").save_pretrained(path)
    return path


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Runner:
    return Runner(tmp_path, monkeypatch)
