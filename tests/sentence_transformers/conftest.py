from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.integrations import peft as integration

from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny causal LM with its tokenizer, as a plain transformers folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def modules_cache(tmp_path, monkeypatch) -> None:
    """transformers copies the code of saved folders to a new folder, and imports it from there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder; later tests must not see it
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # a package of an earlier folder


@pytest.fixture
def add_adapter() -> None:
    """Skips where transformers' own adapter methods refuse the peft that is installed, whatever calls them.

    transformers 5.24 asks for peft 0.22, which was not released when it was.
    """
    needed = getattr(integration, "MIN_PEFT_VERSION", "0")
    if Version(version("peft")) < Version(needed):
        pytest.skip(f"transformers {version('transformers')} needs peft {needed}, found {version('peft')}")
