"""The command line as a user meets it: real processes for the exit codes, in-process calls for the rest."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from gircse import GIRCSE
from gircse.cli import main
from gircse.lm.quiet import quiet_peft
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["one text", "another, longer text", "x", "{braces} stay"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "retrieve it", "query": t[:4], "pos": [t], "neg": [t[::-1]]} for t in TEXTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "gircse", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["demo", "train", "encode", "evaluate", "inspect"])
def test_help_names_every_option_and_needs_no_model(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.count("--") > 4
    assert "None" not in text


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = "import sys; from gircse.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ordinary_use_is_silent(base, tmp_path):
    """Every filter off: not a single warning, with an adapter on the base."""
    with quiet_peft():
        adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    model = ["--model", str(base), "--adapter", str(tmp_path / "adapter")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["encode", str(tmp_path / "texts.txt"), *model, "--output", str(tmp_path / "out.npy")]) == 0
        assert main(["inspect", "a", *model]) == 0
    assert [str(warning.message) for warning in caught if not issubclass(warning.category, ResourceWarning)] == []


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
@pytest.mark.parametrize("output", ["out.npy", "out.jsonl"])
def test_encode_files(base, tmp_path, name, output):
    path = tmp_path / name
    path.write_text("".join((json.dumps({"text": t}) if name.endswith("l") else t) + "\n" for t in TEXTS))
    assert (
        main(["encode", str(path), "--model", str(base), "--output", str(tmp_path / output), "--num-steps", "2"]) == 0
    )
    expected = GIRCSE.from_pretrained(base).encode(TEXTS, num_steps=2)
    if output == "out.npy":
        got = np.load(tmp_path / output)
    else:
        got = np.array([json.loads(line)["embedding"] for line in (tmp_path / output).read_text().splitlines()])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_encode_streams_blocks_and_steps_from_standard_input(base, tmp_path, monkeypatch):
    monkeypatch.setattr("gircse.encode.files.read_texts.__defaults__", None, raising=False)
    monkeypatch.setattr("gircse.encode.files.read_texts.__kwdefaults__", {"field": "text", "block": 3})
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    out = tmp_path / "out.npy"
    assert main(["encode", "-", "--model", str(base), "--output", str(out), "--return-steps", "--num-steps", "3"]) == 0
    expected = GIRCSE.from_pretrained(base).encode(TEXTS, num_steps=3, return_steps=True)
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)


def test_encode_an_empty_file(base, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "out.npy"
    assert main(["encode", str(tmp_path / "empty.txt"), "--model", str(base), "--output", str(out)]) == 0
    assert np.load(out).shape == (0, 32)


def test_a_bad_line_late_in_the_file_leaves_no_output(base, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": 5}\n')
    out = tmp_path / "out.npy"
    assert main(["encode", str(path), "--model", str(base), "--output", str(out)]) == 2
    assert "texts.jsonl:2: expected an object with a string in 'text'" in capsys.readouterr().err
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_evaluate_prints_a_table_and_writes_json(base, rows, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert main(["evaluate", "--model", str(base), "--data", str(rows), "--steps", "1", "3", "--output", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["K", "ndcg@10"]
    assert [line.split()[0] for line in table[2:]] == ["1", "3"]
    assert set(json.loads(out.read_text())) == {"1", "3"}


def test_evaluate_agrees_with_encoding_by_hand(base, rows, tmp_path):
    from gircse.evaluation.metrics import retrieval_metrics

    out = tmp_path / "metrics.json"
    assert main(["evaluate", "--model", str(base), "--data", str(rows), "--steps", "1", "3", "--output", str(out)]) == 0
    model = GIRCSE.from_pretrained(base)
    documents = [d for t in TEXTS for d in (t, t[::-1])]
    documents = list(dict.fromkeys(documents))
    for k in (1, 3):
        queries = model.encode([t[:4] for t in TEXTS], instruction="retrieve it", num_steps=k)
        expected = retrieval_metrics(
            queries, model.encode(documents, num_steps=k), [{documents.index(t)} for t in TEXTS]
        )
        assert json.loads(out.read_text())[str(k)] == pytest.approx(expected)


def test_inspect_table_and_json(base, capsys):
    assert main(["inspect", "--model", str(base), "--num-steps", "2", "--top-n", "3", "a text"]) == 0
    assert "entropy" in capsys.readouterr().out
    assert main(["inspect", "--model", str(base), "--num-steps", "2", "--top-n", "3", "--json", "a text"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert len(parsed[0]["steps"]) == 2
    assert len(parsed[0]["steps"][1]["tokens"]) == 3


def test_train_from_the_command_line_with_evaluation(base, rows, tmp_path, capsys):
    # fmt: off
    code = main([
        "train", "--model", str(base), "--data", str(rows), "--output", str(tmp_path / "run"), "--batch-size", "2",
        "--num-steps", "2", "--no-progress", "--eval-data", str(rows), "--lora-targets", "q_proj", "v_proj",
    ])
    # fmt: on
    assert code == 0
    assert "trained 2 steps" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert "ndcg@10" in log[-1]["evaluation"]["2"]
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert settings["lora_targets"] == ["q_proj", "v_proj"]


def test_train_with_a_recipe(base, rows, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'model = "{base}"\nbatch_size = 4\nnum_steps = "1:2"\nprogress = false\nmax_steps = 2\n')
    arguments = ["--data", str(rows), "--output", str(tmp_path / "run"), "--batch-size", "2"]
    assert main(["train", "--recipe", str(recipe), *arguments]) == 0
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert (settings["batch_size"], settings["num_steps"], settings["max_steps"]) == (2, "1:2", 2)
    assert GIRCSE.from_pretrained(tmp_path / "run" / "model").num_steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "IN", "--model", "/nowhere", "--output", "o.npy"], "name_or_path: /nowhere does not exist"),
        (["encode", "IN", "--model", "BASE", "--output", "o.csv"], "output: got 'o.csv'"),
        (["encode", "/no/file.txt", "--model", "BASE", "--output", "o.npy"], "No such file"),
        (["encode", "IN", "--model", "BASE", "--output", "o.npy", "--num-steps", "-3"], "num_steps: got -3"),
        (["evaluate", "--model", "BASE", "--data", "IN", "--steps", "0", "1"], ":1: "),
        (["inspect", "--model", "BASE", "--num-steps", "0", "a"], "num_steps: got 0"),
        (["train", "--model", "BASE", "--data", "/no/rows.jsonl"], "/no/rows.jsonl"),
        (["train", "--model", "BASE", "--data", "IN", "--batch-size", "0"], "batch_size: got 0"),
        (
            ["train", "--model", "BASE", "--data", "IN", "--num-steps", "9:3"],
            "num_steps: got '9:3', expected an integer",
        ),
        (["train", "--recipe", "IN"], "in.txt: invalid TOML"),
        (["train", "--recipe", "/no/recipe.toml"], "/no/recipe.toml"),
        (["train", "--model", "BASE"], "data: got none, expected --data"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(base, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("a text\n")
    names = {"IN": str(tmp_path / "in.txt"), "BASE": str(base)}
    assert main([names.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"gircse {arguments[0]}: error: ")
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_unknown_command_and_module_entry_point():
    done = run("nonsense")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
    assert run("--version").stdout.startswith("gircse 0.")
