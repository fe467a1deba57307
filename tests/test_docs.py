"""What the documentation shows: Python blocks run, commands have the options that are shown, links lead somewhere.

docs/soft_embed.md and docs/sentence_transformers.md have tests of their own beside what they describe.
"""

from __future__ import annotations

import ast
import importlib.util
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
    if page.parent == ROOT / "docs" and page.name != "README.md":
        assert f"({page.name})" in (ROOT / "docs/README.md").read_text(encoding="utf-8"), "not in the index"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_of_the_code_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.-])(?:gircse|kernels|bench|tests|examples|recipes)/[\w./-]*\w", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for name in re.findall(r"(?<![\w/.-])gircse(?:\.\w+)+", text):
        assert _is_name_of_the_code(name), name


def _is_name_of_the_code(name: str) -> bool:
    """Whether a dotted name is a module, or the module before its last parts mentions the first of these. Nothing is
    imported: mteb alone would take seconds."""
    parts, path = name.split("."), ROOT
    for part in parts:
        if (path / part).is_dir():
            path /= part
        elif (path / f"{part}.py").is_file():
            path /= f"{part}.py"
        else:
            source = path if path.suffix else path / "__init__.py"
            return re.search(rf"\b{part}\b", source.read_text(encoding="utf-8")) is not None
    return True


@pytest.fixture(scope="module")
def make_api():
    """docs/make_api.py; an import of `docs` could find a folder that some other distribution has installed."""
    specification = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_api_page_says_what_the_docstrings_say(make_api):
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run python docs/make_api.py"


@pytest.mark.parametrize(
    "module", ["gircse", "gircse.ops", "gircse.corpora", "gircse.train", "gircse.sentence_transformers"]
)
def test_the_api_page_has_every_public_name(module, make_api):
    source = (ROOT / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    public = set(ast.literal_eval(re.search(r"__all__ = (\[.*?\])", source, re.S)[1])) - {"__version__", "ops"}
    listed = {name for files in make_api.NAMES.values() for names in files.values() for name in names}
    assert public <= listed


def test_the_tree_of_the_readme_is_the_tree():
    """The table names no path that does not exist, and every part of `gircse/`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## How it is built") : text.index("## Install")]
    rows = re.findall(r"^\| (`.+?) \|", table, re.M)
    paths = {path.rstrip("/") for row in rows for path in re.findall(r"`([^`]+)`", row)}
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    unnamed = {"__init__.py", "__main__.py", "_version.py", "integers.py", "train_config.py", "py.typed", "__pycache__"}
    parts = {path.name for path in (ROOT / "gircse").iterdir()} - unnamed
    assert {f"gircse/{part}" for part in parts} <= paths


CITATION = re.compile(r"docs/method\.md §(\d+)(?:-(\d+))?")


def test_every_citation_of_the_method_names_a_section_of_it():
    sections = re.findall(r"^## (\d+)\. ", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.M)
    assert sections == [str(number) for number in range(1, len(sections) + 1)]
    cited: dict[str, list[str]] = {}
    for folder in ("gircse", "kernels", "bench", "tests", "docs", "examples"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
            text = path.read_text(encoding="utf-8")
            where = str(path.relative_to(ROOT))
            assert not re.search(r"\bSPEC \d", text), f"{where}: cites a document that is not in the repository"
            for first, last in CITATION.findall(text):
                cited.setdefault(first, []).append(where)
                cited.setdefault(last or first, []).append(where)
    unknown = {number: places for number, places in cited.items() if number not in sections}
    assert not unknown
    assert len(cited) >= 9, "the pattern finds no citations"
