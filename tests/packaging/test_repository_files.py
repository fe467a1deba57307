"""The files that GitHub and pre-commit read are well formed and agree with the package."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gircse import __version__

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]


def _read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_has_the_version_of_the_package():
    citation = _read("CITATION.cff")
    assert citation["version"] == __version__
    assert citation["references"][0]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_the_hooks_are_those_of_make_lint_in_pinned_versions():
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert lint
    (local,) = _read(".pre-commit-config.yaml")["repos"]
    tools = [re.match(r"\.venv/bin/(\w+)", hook["entry"])[1] for hook in local["hooks"]]
    assert tools == re.findall(r"^\t\$\(BIN\)/(\w+)", lint[1], re.M)
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(re.search(rf"^{tool}==", pinned, re.M) for tool in tools)


def test_the_workflow_runs_the_suite():
    (job,) = _read(".github/workflows/test.yml")["jobs"].values()
    assert "make test" in [step.get("run") for step in job["steps"]]


@pytest.mark.parametrize("name", sorted(os.listdir(ROOT / ".github/ISSUE_TEMPLATE")))
def test_issue_forms_have_what_github_asks_for(name):
    form = _read(f".github/ISSUE_TEMPLATE/{name}")
    assert form["name"]
    assert form["description"]
    assert all({"type", "id", "attributes"} <= set(part) and part["attributes"]["label"] for part in form["body"])
