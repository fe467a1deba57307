"""Recipes: those of the repository are valid, bad ones are refused by file, key and value, the command line wins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gircse.cli import build_parser
from gircse.cli.train import train_config_of
from gircse.train.config import TrainConfig
from gircse.train.recipes import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
PAPERS = ("mistral-7b", "qwen2.5-7b", "qwen2.5-0.5b")
NAMES = {*PAPERS, *(f"{name}-block" for name in PAPERS), "smollm2-demo", "encoder-only", "one-step", "no-penalty"}


def config(*arguments: str) -> TrainConfig:
    return train_config_of(build_parser().parse_args(["train", *arguments]))


def test_the_repository_has_these_recipes():
    assert {path.stem for path in FOLDER.glob("*.toml")} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_recipe_of_the_repository(name):
    path = FOLDER / f"{name}.toml"
    settings = config("--recipe", str(path), "--data", "rows.jsonl")
    assert settings == TrainConfig(**load_recipe(path), data=("rows.jsonl",))
    assert f"--recipe recipes/{name}.toml" in path.read_text()  # the command that its comment gives
    assert path.read_text().startswith("# ")


def test_what_the_papers_recipes_have_in_common_and_the_ablations_change():
    recipes = {name: TrainConfig(**load_recipe(FOLDER / f"{name}.toml")) for name in NAMES}
    paper = recipes["mistral-7b"]
    assert paper.model == "mistralai/Mistral-7B-v0.1"
    for name in ("num_steps", "learning_rate", "warmup_ratio", "contrastive_temperature", "lora_r", "lora_alpha"):
        assert getattr(paper, name) == getattr(TrainConfig(), name) == getattr(recipes["qwen2.5-7b"], name)
    for name in PAPERS:
        assert recipes[name].soft_token_gradient == 1  # the paper's exact gradient
        assert recipes[f"{name}-block"] == replace(recipes[name], soft_token_gradient=0.0)
    changed = {}
    for ablation in ("encoder-only", "one-step", "no-penalty"):
        changed[ablation] = {
            name: value for name, value in vars(recipes[ablation]).items() if value != getattr(paper, name)
        }
        assert changed[ablation].pop("max_steps") * paper.batch_size == 50_000
    assert changed == {
        "encoder-only": {"num_steps": 0},
        "one-step": {"num_steps": 1, "stepwise": False},
        "no-penalty": {"reg_weight": 0.0},
    }


def test_the_command_line_is_over_the_recipe_and_that_over_the_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'model = "m"\ndata = ["a", "b"]\nweights = [2, 1]\nnum_steps = "3:10"\nstepwise = false\nbatch_size = 8\n'
    )
    settings = config("--recipe", str(path), "--batch-size", "64", "--num-steps", "4", "--stepwise")
    assert settings == TrainConfig(model="m", data=("a", "b"), weights=(2.0, 1.0), batch_size=64, num_steps=4)
    assert config("--recipe", str(path)).num_steps == "3:10"
    # a value that is the default is still the command line's
    assert config("--recipe", str(path), "--batch-size", "32").batch_size == 32
    assert config("--model", "m", "--data", "a", "--num-steps", "2:4", "--instructions", "") == TrainConfig(
        model="m", data=("a",), num_steps="2:4", instructions=("",)
    )
    factors = {"0.1": 0.1, "1": 1.0, "0:1@0.5": "0:1@0.5"}
    for text, factor in factors.items():
        settings = config("--model", "m", "--data", "a", "--soft-token-gradient", text)
        assert settings.soft_token_gradient == factor
    with pytest.raises(ValueError, match="data: got none, expected --data"):
        config("--model", "m")
    with pytest.raises(ValueError, match="model: got none"):
        config("--data", "m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size = ", "invalid TOML: "),
        ("batch-size = 3", "batch-size: no such setting, did you mean 'batch_size'?"),
        ("nonsense = 3", "nonsense: no such setting, expected a name that `gircse train --help` lists"),
        ("[train]\nbatch_size = 3", "train: no such setting"),
        ('batch_size = "3"', "batch_size: got '3', expected an integer"),
        ("output = 2026-01-01", "output: got datetime.date(2026, 1, 1), expected a string"),
    ],
)
def test_bad_recipes_name_file_key_value_and_what_was_expected(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_recipe(path)


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"model = '\xff'")
    with pytest.raises(ValueError, match="not UTF-8: byte 10"):
        load_recipe(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load_recipe(tmp_path / "nowhere.toml")
    path.write_bytes(b"")
    assert load_recipe(path) == {}
