"""Configs and recipes with any values: settings that hold together, or an error that names file and setting."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse.corpora.manifest import begin
from gircse.engine import EngineConfig
from gircse.lm.config import CONFIG_NAME, GircseConfig
from gircse.train.config import TrainConfig
from gircse.train.distill_config import DistillConfig
from gircse.train.log import read_log
from gircse.train.recipes import load_recipe
from tests.fuzz.json_values import damaged, dumped, values
from tests.fuzz.outcome import outcome
from tests.fuzz.profiles import fuzz

CONFIGS = (TrainConfig, DistillConfig, GircseConfig, EngineConfig)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def changed(draw: Any, config: type) -> dict[str, Any]:
    """A few settings of a config, with any values."""
    names = st.sampled_from([field.name for field in fields(config)])
    return draw(st.dictionaries(names, values, min_size=1, max_size=2))


@pytest.mark.parametrize("config", CONFIGS)
@fuzz(80)
@given(data=st.data())
def test_settings(config, data):
    given_values = changed(data.draw, config)
    built, error = outcome(lambda: config(**given_values), ValueError)
    if error is not None:
        assert any(str(error).startswith(f"{name}") for name in [f.name for f in fields(config)])
        return
    for name, value in given_values.items():  # what is accepted is what it says, as JSON would give it back
        kept = getattr(built, name)
        assert kept == (
            tuple(value) if isinstance(kept, tuple) else type(kept)(value) if type(kept) is float else value
        )
        assert type(kept) is type(value) or isinstance(kept, (tuple, float))
    json.dumps(asdict(built), allow_nan=False)
    if config is TrainConfig:
        low, high = built._steps()
        assert low <= built.steps_at(3) <= high
    if config is DistillConfig:
        hash(built)


@fuzz(80)
@given(data=st.data())
def test_files_of_settings(folder, data):
    for path, config, load in (
        (folder / "train_config.json", TrainConfig, TrainConfig.from_json),
        (folder / CONFIG_NAME, GircseConfig, lambda path: GircseConfig.load(path.parent)),
    ):
        wanted = {**asdict(config()), **changed(data.draw, config)} if data.draw(st.booleans()) else data.draw(values)
        path.write_bytes(damaged(dumped(wanted), data.draw))
        loaded, error = outcome(lambda load=load, path=path: load(path), ValueError)
        assert isinstance(loaded, config) or str(error).startswith(f"{path}: ")


TOML = [
    "num_steps = 3",
    "dtype = 'auto'",
    "data = ['a']",
    "[table]",
    "seed = 1e400",
    "seed = nan",
    "x.y = 1",
    "a = [" * 500,
]
TOML += ["learning_rate = " + "9" * 400, "progress = 2020-01-01", "pooling = '''last'''", 'model = "\\ud800"', "\0"]


@fuzz(60)
@given(data=st.data())
def test_recipes(folder, data):
    path = folder / "recipe.toml"
    lines = data.draw(st.lists(st.sampled_from(TOML), max_size=3))
    path.write_bytes(damaged("\n".join(lines).encode(), data.draw))
    recipe, error = outcome(lambda: load_recipe(path), ValueError)
    assert isinstance(recipe, dict) or str(error).startswith(f"{path}: ")
    if recipe is not None:
        TrainConfig(**recipe)


@fuzz(60)
@given(data=st.data())
def test_manifests_of_encoded_corpora(folder, data):
    path = folder / "out" / ".gircse" / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damaged(dumped(data.draw(values)), data.draw))
    _, error = outcome(lambda: begin(str(folder / "out"), {"model": "m", "rows_per_task": 4}), ValueError)
    assert str(folder / "out") in str(error)


@fuzz(60)
@given(data=st.data())
def test_logs(folder, data):
    entries = [data.draw(values) if data.draw(st.booleans()) else {"step": i, "loss": float("inf")} for i in range(3)]
    content = damaged(b"".join(dumped(entry) + b"\n" for entry in entries), data.draw)
    path = folder / "train_log.jsonl"
    path.write_bytes(content)
    entries, error = outcome(lambda: read_log(path), ValueError)
    if error is not None:
        assert str(error).startswith(f"{path}:")
    else:
        *lines, last = content.split(b"\n")
        assert entries[: len(lines)] == [json.loads(line) for line in lines]
        assert entries[len(lines) :] in ([], [outcome(lambda: json.loads(last), ValueError, RecursionError)[0]])
