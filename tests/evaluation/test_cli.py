"""`gircse evaluate` beyond own rows (those are in tests/cli/test_commands.py)."""

from __future__ import annotations

import json
import sys

import pytest

from gircse.cli import main
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_tasks_give_mteb_json_a_table_and_a_plot(base, tmp_path, capsys):
    pytest.importorskip("mteb")
    # fmt: off
    command = [
        "evaluate", "--model", base, "--tasks", "StdlibRelatednessSTS", "--steps", "1", "3",
        "--max-length", "96", "--output", str(tmp_path),
    ]
    # fmt: on
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["task", "metric", "K=1", "K=3"]
    assert printed.out.splitlines()[2].startswith("StdlibRelatednessSTS  cosine_spearman")
    assert (tmp_path / "scores.txt").read_text().strip() == printed.out.strip()
    assert (tmp_path / "scores.png").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == "gircse/tiny"
    assert summary["steps"] == [1, 3]
    results = list((tmp_path / "results" / "gircse__tiny").rglob("StdlibRelatednessSTS.json"))
    assert {path.parent.name.rsplit("_", 1)[1] for path in results} == {"1", "3"}
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == printed.out
    assert "\n0 texts encoded" in again.err


def test_instruction_following(base, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "scores.json"
    arguments = ["--steps", "1", "3", "--max-length", "64", "--output", str(out)]
    assert main(["evaluate", "--model", base, "--instruction-following", *arguments]) == 0
    assert capsys.readouterr().out.split()[:3] == ["K", "area", "triplets"]
    assert set(json.loads(out.read_text())["3"]) >= {"area triplets", "action v_measure", "both", "score"}


def test_data_sets_out_of_reach_are_one_clear_line(base, tmp_path, capsys, monkeypatch):
    pytest.importorskip("mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    def unreachable(self, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(AbsTaskRetrieval, "load_data", unreachable)
    arguments = ["--benchmark", "MTEB(eng, v2)", "--output", str(tmp_path), "--steps", "1"]
    assert main(["evaluate", "--model", base, *arguments]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("gircse evaluate: error: task ArguAna: its data set mteb/arguana is not in the cache")
    assert "Couldn't reach the Hub" in line
    assert "--benchmark offline" in line


@pytest.mark.parametrize(
    ("option", "module"),
    [(["--benchmark", "offline"], "mteb"), (["--tasks", "STS12"], "mteb"), (["--instruction-following"], "sklearn")],
)
def test_a_missing_extra_gives_the_command_that_installs_it(base, option, module, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == module or n.startswith("gircse.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert main(["evaluate", "--model", base, *option]) == 2
    error = capsys.readouterr().err
    assert f"needs {module}" in error
    assert "pip install 'gircse[eval]'" in error
    assert len(error.strip().splitlines()) == 1


def test_exactly_one_thing_is_evaluated(base, capsys):
    for arguments in ([], ["--tasks", "STS12", "--benchmark", "offline"], ["--data", "x", "--instruction-following"]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "--model", base, *arguments])
        assert stop.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
