"""`gircse analyze` as a command."""

from __future__ import annotations

import json

import pytest

from gircse.cli import main
from tests.analysis.test_analyze import CLUSTERS, DOCUMENTS, QUERIES
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_the_command_writes_its_folder(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": "retrieve it", "query": q, "pos": [d]} for q, d in zip(QUERIES, DOCUMENTS, strict=False)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = zip(CLUSTERS.texts, CLUSTERS.labels, strict=True)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"text": t, "label": l}) + "\n" for t, l in labels))
    out = tmp_path / "out"
    # fmt: off
    arguments = [
        "analyze", "--model", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--max-rows", "4",
        "--baseline", str(tmp_path / "base"), "--labels", str(tmp_path / "labels.jsonl"), "--steps", "1", "3",
        "--sample", "4", "--output", str(out),
    ]
    # fmt: on
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split()[0] == "K"
    assert "quality.svg" in captured.err
    written = json.loads((out / "analysis.json").read_text())
    assert written["texts"] == {"queries": 4, "documents": 4}
    assert written["models"]["baseline"] == str(tmp_path / "base")
    assert set(written["quality"]) == {"1", "3"}
    assert {p.name for p in out.iterdir()} == {"analysis.json"} | {
        f"{n}.{s}" for n in ("quality", "movement", "soft_tokens", "clustering") for s in ("png", "svg")
    }
    assert main([*arguments[:5], "--max-rows", "0"]) == 2
    assert "max_rows: got 0" in capsys.readouterr().err


def test_help_names_every_option_and_needs_no_model(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyze", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--baseline", "--labels", "--steps", "--sample", "--max-rows", "--output"):
        assert option in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/rows.jsonl"], "/no/rows.jsonl"),
        (["--data", "ROWS", "--labels", "/no/labels.jsonl"], "/no/labels.jsonl: no such file"),
        (["--data", "ROWS", "--labels", "ROWS"], "rows.jsonl:1: expected an object with"),
    ],
)
def test_bad_files_are_reported_before_a_model_is_loaded(tmp_path, arguments, message, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "retrieve it", "query": "q", "pos": ["d"]}) + "\n")
    given = [str(rows) if a == "ROWS" else a for a in arguments]
    assert main(["analyze", "--model", "/no/model", *given, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
