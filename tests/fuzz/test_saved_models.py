"""Saved models and adapters, damaged in every way: an error that names the folder, or the model that was saved.

Not noticed are bits that flip among the numbers themselves: safetensors has no checksums.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gircse import GIRCSE, UnsupportedModelError
from tests.fuzz.hostile_pickle import plain_pickle, save_torch
from tests.fuzz.json_values import damaged, dumped, values
from tests.fuzz.outcome import outcome
from tests.fuzz.profiles import fuzz
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a text", "another one"]
REFUSALS = (ValueError, OSError, UnsupportedModelError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    GIRCSE(tiny_model("llama"), tiny_tokenizer()).save_pretrained(folder / "model")
    base = get_peft_model(GIRCSE.from_pretrained(folder / "model").base, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    GIRCSE(base, tiny_tokenizer()).save_pretrained(folder / "adapter")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return {name: folder / name for name in ("model", "adapter")}


@pytest.fixture(scope="module")
def expected(saved) -> dict[str, np.ndarray]:
    return {name: GIRCSE.from_pretrained(path).encode(TEXTS, num_steps=1) for name, path in saved.items()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("copy") / "of it"


def load(path: Path, allowed: Any = REFUSALS) -> GIRCSE | None:
    """The model, or None after an error that names the folder."""
    found, error = outcome(lambda: GIRCSE.from_pretrained(path), *allowed)
    assert error is None or str(path) in str(error) or isinstance(error, UnsupportedModelError), error
    return found


def fresh(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


WEIGHTS = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ["model", "adapter"])
@fuzz(8)
@given(data=st.data())
def test_weights_cut_short_or_of_another_file(kind, saved, expected, copy, data):
    path = fresh(saved[kind], copy) / WEIGHTS[kind]
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    how = data.draw(st.sampled_from(["cut in header", "cut", "longer", "noise", "gone"]))
    if how == "gone":
        path.unlink()
    elif how == "noise":
        path.write_bytes(data.draw(st.binary(max_size=30)))
    elif how == "longer":
        path.write_bytes(content + b"\0" * data.draw(st.integers(1, 9)))
    else:
        path.write_bytes(content[: data.draw(st.integers(0, header if how == "cut in header" else len(content) - 1))])
    assert load(copy) is None


@pytest.mark.parametrize("kind", ["model", "adapter"])
@fuzz(8)
@given(data=st.data())
def test_weights_that_are_missing_or_of_another_shape(kind, saved, expected, copy, data):
    path = fresh(saved[kind], copy) / WEIGHTS[kind]
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["missing", "longer", "flat", "renamed", "half"]))
    value = tensors.pop(name)
    if how == "longer":
        tensors[name] = torch.cat([value, value])
    elif how == "flat":
        tensors[name] = value[None].contiguous()
    elif how == "renamed":
        tensors[f"{name}.."] = value
    elif how == "half":
        tensors[name] = value.half()
    save_file(tensors, path, metadata={"format": "pt"})
    model = load(copy)
    if how == "half":  # another dtype is no damage: the numbers are these
        assert model is not None
        np.testing.assert_allclose(model.encode(TEXTS, num_steps=1), expected[kind], atol=2e-2)
    else:
        assert model is None


@pytest.mark.parametrize("kind", ["model", "adapter"])
@fuzz(8)
@given(data=st.data())
def test_json_files(kind, saved, expected, copy, data):
    fresh(saved[kind], copy)
    path = data.draw(st.sampled_from(sorted(copy.glob("*.json"))))
    content = path.read_bytes()
    if data.draw(st.booleans()):
        record = json.loads(content)
        names = st.sampled_from(sorted(record)) | st.sampled_from(["auto_map", "architectures", "model_type", "dtype"])
        record.update(data.draw(st.dictionaries(names, values, min_size=1, max_size=1)))
        content = dumped(record)
    else:
        content = damaged(content, data.draw)
    path.write_bytes(content)
    model = load(copy)
    if model is not None:
        outcome(lambda: model.encode(TEXTS, num_steps=1), ValueError, TypeError)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "model.pt", "tokenizer.pkl"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_hostile_pickle_is_never_run(saved, copy, tmp_path, name, packed):
    kind = "adapter" if name.startswith("adapter") else "model"
    path = fresh(saved[kind], copy) / name
    (copy / WEIGHTS[kind]).unlink()
    sentinel = tmp_path / "it has run"
    if packed:
        save_torch(path, sentinel, **tiny_model("llama").state_dict())
    else:
        path.write_bytes(plain_pickle(sentinel))
    assert load(copy) is None
    assert not sentinel.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_not_run(saved, copy, tmp_path, file):
    fresh(saved["model"], copy)
    sentinel = tmp_path / "it has run"
    (copy / "evil.py").write_text(f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\n")
    record = json.loads((copy / file).read_text())
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    record |= {"auto_map": classes, "model_type": "unheard-of", "tokenizer_class": "Unheard"}
    (copy / file).write_text(json.dumps(record))
    load(copy)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "name", ["..", "../..", ".", "a/../../b", "\0", "é" * 300, "a b", "-rf", "%s", "{x}", "\ud800", "", "a\nb", "con"]
)
def test_odd_names(saved, tmp_path, name, monkeypatch):
    """A name is a folder or a hub's; whatever it is, only what it says is looked at, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for options in ({}, {"adapter": name}):
        first = saved["model"] if options else name
        outcome(lambda first=first, options=options: GIRCSE.from_pretrained(first, **options), *REFUSALS)
    assert not list(tmp_path.iterdir())


def test_sentence_transformers_folders(saved, copy, tmp_path):
    st_loading = pytest.importorskip("gircse.sentence_transformers.loading")
    sentinel = tmp_path / "it has run"
    for modules, words in (
        ("{", "modules.json cannot be read"),
        ('{"a": 1}', "modules.json cannot be read"),
        ('[{"type": 5, "path": ""}]', "modules.json: got"),
        ('[{"type": "modeling_gircse.GIRCSEModule", "path": ""}, {"type": "t", "path": "../x"}]', "modules.json: got"),
        ('[{"type": "modeling_gircse.GIRCSEModule", "path": ""}, {"type": "evil.T", "path": "x"}]', "evil"),
    ):
        fresh(saved["model"], copy)
        (copy / "evil.py").write_text(f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\n")
        (copy / "modules.json").write_text(modules)
        with pytest.raises(ValueError, match=words):
            st_loading.load(copy)
    assert not sentinel.exists()
