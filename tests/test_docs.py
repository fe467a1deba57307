"""What the documentation shows: Python blocks run, commands have the options that are shown, links lead somewhere.

docs/soft_embed.md and docs/sentence_transformers.md have tests of their own beside what they describe.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gircse import GIRCSE
from gircse.cli import build_parser
from tests.tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
]
# what stands for a model or a size that a test cannot have
SUBSTITUTES = {'"Qwen/Qwen2.5-0.5B"': "path", '"Qwen/Qwen2.5-7B"': "path", "151_936": "1_000"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "base"
    tiny_model("llama-tied").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def _blocks(page: Path, *languages: str) -> list[str]:
    """The contents of fenced blocks in these languages ("": a fence without one)."""
    found: list[str] = []
    inside: list[str] | None = None
    language = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, language = [], line[3:].strip()
        else:
            if language in languages:
                found.append("\n".join(inside) + "\n")
            inside = None
    return found


def _run(page: Path, names: dict[str, Any]) -> None:
    for number, block in enumerate(_blocks(page, "python"), start=1):
        for shown, real in SUBSTITUTES.items():
            block = block.replace(shown, real)
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("name", ["engine", "inspecting", "planning", "quickstart"])
def test_python_blocks_run(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"path": str(folder), "output": str(tmp_path), "model": GIRCSE.from_pretrained(folder)}
    _run(ROOT / "docs" / f"{name}.md", names)


def test_python_blocks_of_the_evaluation_run(folder, tmp_path, monkeypatch):
    pytest.importorskip("mteb")
    from gircse.evaluation import run

    monkeypatch.chdir(tmp_path)
    found = run.find_tasks
    # one of the six: tests/evaluation runs them all
    monkeypatch.setattr(run, "find_tasks", lambda *names: [t for t in found(*names) if "Pair" in t.metadata.name])
    _run(ROOT / "docs/evaluation.md", {"model": GIRCSE.from_pretrained(folder, num_steps=2)})


def test_python_blocks_of_the_readme_run(folder, tmp_path, monkeypatch):
    from gircse.train.config import TrainConfig
    from gircse.train.lora import trainable_model

    monkeypatch.chdir(tmp_path)
    trainable_model(TrainConfig(model=str(folder))).save_pretrained(tmp_path / "path/to/lora")
    line = '{"prompt": "Find it", "query": "q%d", "pos": ["p%d"], "neg": ["n"]}\n'
    (tmp_path / "rows.jsonl").write_text("".join(line % (i, i) for i in range(64)))
    _run(ROOT / "README.md", {"path": str(folder)})
    assert (tmp_path / "runs/mine/model/adapter_config.json").is_file()


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in _blocks(page, "bash", "sh", ""):
            text = re.sub(r"\\\n\s*", " ", block)
            found += [
                (page.name, line.strip())
                for line in text.splitlines()
                if re.match(r"\s*(gircse|torchrun .*-m gircse)", line) and " ... " not in line
            ]
    return found


@pytest.mark.parametrize(("page", "command"), _commands())
def test_commands_have_the_options_that_are_shown(page, command):
    words = shlex.split(command, comments=True)
    words = words[: words.index("|")] if "|" in words else words
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        words = ["gircse", *(["train"] if words[module] == "gircse.train" else []), *words[module + 1 :]]
    build_parser().parse_args(words[1:])


def test_commands_were_found():
    assert len(_commands()) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
    if page.parent.name == "docs" and page.name != "README.md":
        assert f"({page.name})" in (ROOT / "docs/README.md").read_text(encoding="utf-8"), "not in the index"
