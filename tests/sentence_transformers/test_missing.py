"""Without sentence-transformers, or with an old one, the error says what to install."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

import gircse


@pytest.fixture
def forgotten(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("gircse.sentence_transformers")]:
        monkeypatch.delitem(sys.modules, name)


def test_not_installed(monkeypatch, forgotten):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=r"gircse.load .* pip install 'sentence-transformers>=6'"):
        gircse.load  # noqa: B018


def test_too_old(monkeypatch, forgotten):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.6.1")
    with pytest.raises(ImportError, match=r">= 6, got 5\.6\.1: pip install"):
        gircse.load  # noqa: B018
