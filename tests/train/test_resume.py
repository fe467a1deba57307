"""What is the same run: its settings are saved, data and base are known by what they hold, and it may become longer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from gircse.cli import main
from gircse.train.checkpoint import list_checkpoints
from gircse.train.config import TrainConfig
from gircse.train.learning_rate import learning_rate
from tests.tiny_models import tiny_model, tiny_tokenizer

WORDS = ["red", "blue", "fox", "dog", "tree"]
ROWS = [{"query": f"{a} {b}", "pos": [f"{b} {a}"]} for a in WORDS for b in WORDS if a != b]


@pytest.fixture
def home(tmp_path) -> Path:
    """A base model, rows without a prompt, and a finished run of 4 steps that began with `command`."""
    save_base(tmp_path / "base")
    write(tmp_path / "rows.jsonl", ROWS)
    assert main(command(tmp_path)) == 0
    return tmp_path


def save_base(folder: Path, **options) -> None:
    tiny_model("llama", **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(home: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(home / "base"), "--data", str(home / "rows.jsonl"), "--instructions", "echo",
        "--eval-data", str(home / "rows.jsonl"), "--output", str(home / "run"), "--batch-size", "4", "--num-steps", "2",
        "--max-steps", "4", "--save-every", "2", "--learning-rate", "3e-3", "--micro-batch-tokens", "500",
        "--soft-token-gradient", "0.4:0@0.5", "--no-progress", "--device", "cpu", *more,
    ]  # fmt: skip


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple]:
    names = ("losses", "learning_rate", "soft_token_gradient", "evaluation")
    return [tuple(map(entry.get, names)) for entry in log(run)]


def test_the_run_folder_alone_goes_on(home):
    run, whole = home / "run", numbers(home / "run")
    weights = (run / "model" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(list_checkpoints(run)[-1])
    assert main(["train", "--resume", "--output", str(run)]) == 0
    assert numbers(run) == whole
    assert (run / "model" / "adapter_model.safetensors").read_bytes() == weights
    assert [entry[2] for entry in whole] == [0.4, 0.2, 0, 0]  # one step after the other, then by the block
    assert whole[-1][3] is not None  # evaluated, with the instruction for rows without one
    assert TrainConfig.from_json(run / "train_config.json").num_steps == 2


def test_rows_without_a_prompt_are_distilled_and_evaluated_as_they_were_trained(home, capsys):
    model, rows = str(home / "run" / "model"), str(home / "rows.jsonl")
    distilled = ["distill", "--teacher", model, "--data", rows, "--eval-data", rows, "--output", str(home / "student")]
    distilled += ["--batch-size", "4", "--max-steps", "1", "--no-progress"]
    evaluated = ["evaluate", "--model", model, "--data", rows, "--steps", "2", "--output", str(home / "metrics.json")]
    for arguments in (distilled, evaluated):
        assert main(arguments) == 2
        assert 'rows.jsonl:1: the field "prompt" is missing' in capsys.readouterr().err
        assert main([*arguments, "--instruction", "echo"]) == 0
    assert json.loads((home / "metrics.json").read_text())["2"] == pytest.approx(
        log(home / "run")[-1]["evaluation"]["2"]
    )


def test_a_finished_run_can_be_extended(home, capsys):
    run = home / "run"
    before = numbers(run)
    assert main(["train", "--resume", "--output", str(run), "--max-steps", "6"]) == 0
    after = numbers(run)
    assert after[:4] == before
    assert [entry["step"] for entry in log(run)] == [1, 2, 3, 4, 5, 6]
    rates = [learning_rate(TrainConfig(learning_rate=3e-3), step, 6) for step in (4, 5)]
    assert [rate for _, rate, *_ in after[4:]] == rates
    assert main(["train", "--resume", "--output", str(run), "--max-steps", "5"]) == 2
    assert "max_steps: got 5, expected at least the 6 that the run was started with" in capsys.readouterr().err


def test_everything_may_have_been_moved(home, monkeypatch):
    whole = numbers(home / "run")
    shutil.rmtree(list_checkpoints(home / "run")[-1])
    (home / "new").mkdir()
    for name in ("run", "base", "rows.jsonl"):
        (home / name).rename(home / "new" / name)
    monkeypatch.chdir(home / "new")
    moved = ["--model", "./base", "--data", "rows.jsonl", "--eval-data", "rows.jsonl"]
    assert main(["train", "--resume", "--output", "run", *moved]) == 0
    assert numbers(Path("run")) == whole


@pytest.mark.parametrize("what", ["base", "rows", "settings", "tokenizer"])
def test_other_contents_are_another_run(home, capsys, what):
    if what == "base":
        save_base(home / "base", seed=1)
        message = "resume: the run was started with another model: .*base has another base"
    elif what == "tokenizer":
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens("fox")
        tokenizer.save_pretrained(home / "base")
        message = "resume: the run was started with another model: .*base has another vocabulary"
    elif what == "rows":
        write(home / "rows.jsonl", [{**ROWS[0], "query": "other"}, *ROWS[1:]])
        message = r"resume: the data have changed since the run was started: .*rows.jsonl: 20 rows, but others"
    else:
        message = "resume: the run was started with other settings: seed: was 0, is 1"
    assert main(command(home, "--resume", *(["--seed", "1"] if what == "settings" else []))) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_adapter_cannot_come_in_later(home, capsys):
    adapter = ["--adapter", str(home / "run" / "model")]
    assert main(["train", "--resume", "--output", str(home / "run"), *adapter]) == 2
    assert f"started with another model: {home / 'run' / 'model'} has another adapter" in capsys.readouterr().err
    assert main(command(home, "--output", str(home / "more"), *adapter)) == 0
    (home / "run" / "model").rename(home / "elsewhere")
    arguments = ["train", "--resume", "--output", str(home / "more"), "--adapter", str(home / "elsewhere")]
    assert main(arguments) == 0
    shutil.copytree(home / "more" / "model", home / "elsewhere", dirs_exist_ok=True)
    assert main(arguments) == 2
    assert f"started with another model: {home / 'elsewhere'} has another adapter" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["[", "3", "{}", None])
def test_a_damaged_run_folder_is_named(home, capsys, damaged):
    path = home / "run" / "train_model.json"
    path.unlink() if damaged is None else path.write_text(damaged)
    assert main(["train", "--resume", "--output", str(home / "run")]) == 2
    assert f"{path}" in capsys.readouterr().err
