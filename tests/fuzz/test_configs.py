"""Configs and recipes with any values: settings that hold together, or an error that names file and setting."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse.encode.shard_folder import MANIFEST
from gircse.encode.sharded import encode_sharded
from gircse.engine import EngineConfig
from gircse.lm.config import CONFIG_NAME, GircseConfig
from gircse.train.config import TrainConfig
from gircse.train.distill_config import DistillConfig
from gircse.train.log import LOG_NAME, read_log
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
    found, error = outcome(lambda: config(**given_values), ValueError)
    if error is not None:
        assert any(str(error).startswith(f"{name}") for name in [f.name for f in fields(config)])
        return
    for name, value in given_values.items():  # what is accepted is what it says, as JSON would give it back
        kept = getattr(found, name)
        assert kept == (
            tuple(value) if isinstance(kept, tuple) else type(kept)(value) if type(kept) is float else value
        )
        assert type(kept) is type(value) or isinstance(kept, (tuple, float))
    json.dumps(asdict(found), allow_nan=False)
    if config is TrainConfig:
        low, high = found._steps()
        assert low <= found.steps_at(3) <= high
    if config is DistillConfig:
        hash(found)


@fuzz(80)
@given(data=st.data())
def test_files_of_settings(folder, data):
    for path, config, load in (
        (folder / "train_config.json", TrainConfig, TrainConfig.from_json),
        (folder / CONFIG_NAME, GircseConfig, lambda path: GircseConfig.load(path.parent)),
    ):
        wanted = {**asdict(config()), **changed(data.draw, config)} if data.draw(st.booleans()) else data.draw(values)
        path.write_bytes(damaged(dumped(wanted), data.draw))
        found, error = outcome(lambda load=load, path=path: load(path), ValueError)
        assert isinstance(found, config) or str(error).startswith(f"{path}: ")


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
    found, error = outcome(lambda: load_recipe(path), ValueError)
    assert isinstance(found, dict) or str(error).startswith(f"{path}: ")
    if found is not None:
        TrainConfig(**found)


@fuzz(60)
@given(data=st.data())
def test_manifests_of_shards(folder, data):
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    (folder / "in.txt").write_text("a\nb\n")
    settings = {"shard_size": data.draw(values)} if data.draw(st.booleans()) else data.draw(values)
    manifest = {"settings": settings, "texts": data.draw(values), "shards": 1, "complete": False}
    (shards / MANIFEST).write_bytes(damaged(dumped(manifest), data.draw))

    def never(*_: Any) -> Any:
        raise AssertionError

    call = lambda: encode_sharded(never, never, str(folder / "in.txt"), str(shards), settings={}, timeout=1)  # noqa: E731
    _, error = outcome(call, ValueError)
    assert str(shards) in str(error)


@fuzz(60)
@given(data=st.data())
def test_logs(folder, data):
    entries = [data.draw(values) if data.draw(st.booleans()) else {"step": i, "loss": float("inf")} for i in range(3)]
    content = damaged(b"".join(dumped(entry) + b"\n" for entry in entries), data.draw)
    (folder / LOG_NAME).write_bytes(content)
    found, error = outcome(lambda: read_log(folder), ValueError)
    if error is not None:
        assert str(error).startswith(f"{folder / LOG_NAME}:")
    else:
        *lines, last = content.split(b"\n")
        assert found[: len(lines)] == [json.loads(line) for line in lines]
        assert found[len(lines) :] in ([], [outcome(lambda: json.loads(last), ValueError, RecursionError)[0]])
