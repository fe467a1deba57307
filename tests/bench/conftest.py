"""The GPU suite for tests of it."""

from __future__ import annotations

import pytest

from tests.bench.suite_runner import Runner


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Runner:
    return Runner(tmp_path, monkeypatch)
