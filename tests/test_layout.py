"""The tree: imports run one way, files stay short, and the tests lie where the sources lie."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "gircse"

# A part imports from the parts of the lines above it only, and within its own part without a circle.
LEVELS = (
    {"files", "roofline", "integers", "_version"},
    {"show"},
    {"ops"},
    {"lm"},
    {"engine", "data"},
    {"embedder"},
    {"encode"},
    {"inspect"},
    {"model"},
    {"evaluation", "sentence_transformers", "corpora"},
    {"train", "analysis"},
    {"train_config", "demo"},  # the first is the public name of `train.config`
    {"cli"},
    {"__main__"},
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
UPWARDS = {("gircse.train.__main__", "gircse.cli")}  # what `python -m gircse.train` runs
# `gircse` itself names the public classes, which it imports on first use.
PUBLIC_NAMES = "gircse"


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """The modules of `gircse` that a module imports anywhere, inside functions and for type checkers too."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        else:
            continue
        yield from (module for module in found if module.split(".")[0] == "gircse" and module in FILES)


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else name


GRAPH = {name: set(imports(name)) - {name, PUBLIC_NAMES} for name in FILES}


@pytest.mark.parametrize("name", [name for name in FILES if name != PUBLIC_NAMES])
def test_imports_run_one_way(name: str) -> None:
    for imported in GRAPH[name]:
        if (name, imported) in UPWARDS:
            continue
        own, other = LEVEL[part(name)], LEVEL[part(imported)]
        assert part(name) == part(imported) or other < own, f"{name} imports {imported}, which stands above it"


def test_the_named_exceptions_exist() -> None:
    assert all(imported in GRAPH[name] for name, imported in UPWARDS)


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in sorted(GRAPH[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_few_modules_stand_outside_the_packages() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


# Tests of a package lie in the folder of its name; these cut across packages.
ACROSS = {"bench", "examples", "fuzz", "gpu", "kernels", "matrix", "mutation", "packaging"}


def test_tests_mirror_the_source_tree() -> None:
    """A test file is named after the module that it tests, or, where it tests a behaviour, lies in its package's
    folder."""
    tests = REPOSITORY / "tests"
    for folder in tests.rglob("*"):
        if folder.is_dir() and any(folder.glob("test_*.py")):
            where = folder.relative_to(tests)
            assert where.parts[0] in ACROSS or (PACKAGE / where).is_dir(), where


def test_no_file_is_long() -> None:
    long = {
        str(file.relative_to(REPOSITORY)): lines
        for folder in ("gircse", "kernels", "bench", "tests", "examples")
        for file in (REPOSITORY / folder).rglob("*.py")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
