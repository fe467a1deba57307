"""The matrix names what pyproject.toml promises, and says when it could not test it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.matrix import run
from tests.matrix.run import VERSIONS, Outcome, Unavailable, torch_requirement

PROJECT = run.tomllib.loads((run.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lower_bounds() -> dict[str, str]:
    """Of everything but what serves development alone; the lower of two bounds of a package is the one that counts."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name, lines in extras.items() if name != "dev" for line in lines)]
    found: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        (bound,) = (part for part in requirement.specifier if part.operator != "<")
        assert bound.operator == ">=", requirement
        found[requirement.name] = min(found.get(requirement.name, bound.version), bound.version, key=Version)
    return found


def test_oldest_is_the_lower_bounds_of_the_project():
    untested = VERSIONS["untested"]
    assert VERSIONS["oldest"] == {name: bound for name, bound in lower_bounds().items() if name not in untested}
    assert set(untested) <= set(lower_bounds())


def test_development_asks_for_no_newer_release_than_users_do():
    """Else the oldest environment, which has both, would not be the oldest."""
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["dev"]):
        oldest = VERSIONS["oldest"].get(requirement.name)
        assert oldest is None or requirement.specifier.contains(oldest), requirement


def test_the_lowest_python_is_the_project_s():
    assert PROJECT["requires-python"] == f">={VERSIONS['pythons'][0]}"


@pytest.fixture
def index(monkeypatch) -> dict[str, Any]:
    """What pip's report says of each requirement: (version, its requirements), or absent where nothing matches."""
    builds: dict[str, Any] = {}

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        found = builds.get(command[-1])
        if found is None:
            return subprocess.CompletedProcess(command, 1)
        metadata = {"version": found[0], "requires_dist": found[1]}
        Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": [{"metadata": metadata}]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    return builds


CUDA = ["filelock", 'nvidia-cudnn-cu13==9.1; platform_system == "Linux"', "triton==3.6.0"]
PINNED = f"torch=={next(line for line in (run.ROOT / 'constraints.txt').read_text().split() if 'torch==' in line)[7:]}"


def test_a_cpu_build_is_taken_as_it_is(index):
    index["torch==2.11"] = "2.11.0+cpu", ["filelock"]
    assert torch_requirement("python", "torch==2.11", cuda=False) == ("torch==2.11.0+cpu", [])


def test_a_cuda_build_is_replaced_and_the_pin_is_reported(index):
    index["torch==2.11"] = "2.11.0", CUDA
    index[PINNED] = "2.13.0+cpu", ["filelock"]
    torch, untested = torch_requirement("python", "torch==2.11", cuda=False)
    assert torch == "torch==2.13.0+cpu"
    assert untested == [
        "torch==2.11: 2.11.0 can be had as a CUDA build only (CUDA=1 takes it); ran on torch 2.13.0+cpu"
    ]
    assert torch_requirement("python", "torch==2.11", cuda=True) == ("torch==2.11.0", [])


def test_without_any_build_the_combination_is_skipped_and_that_is_no_success(index, monkeypatch, capsys):
    index[PINNED] = "2.13.0", CUDA
    with pytest.raises(Unavailable, match=r"torch==2.11: no build .*; torch==.* CUDA build only"):
        torch_requirement("python", "torch==2.11", cuda=False)
    monkeypatch.setattr(run, "interpreter", lambda version: (_ for _ in ()).throw(Unavailable(f"no python{version}")))
    assert run.main(["oldest", "--pythons", "3.10"]) == 1
    said = capsys.readouterr().out
    assert "oldest on Python 3.10: SKIPPED: no python3.10" in said
    assert "matrix: 0 passed, 0 failed, 1 skipped" in said


def test_interpreters_are_found_by_version():
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert run.interpreter(version) == sys.executable
    with pytest.raises(Unavailable, match=r"no python2\.99"):
        run.interpreter("2.99")


@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (5, 1)])
def test_the_verdict_is_that_of_pytest(monkeypatch, capsys, code, status):
    monkeypatch.setattr(run, "build", lambda *_, **__: ["torch==2.11: ran on torch 2.13"])
    monkeypatch.setattr(run, "interpreter", lambda version: "python")
    monkeypatch.setattr(run, "installed", lambda folder: {"python": "3.11.7", "torch": "2.13.0"})
    monkeypatch.setattr(run, "run_suite", lambda *_: code)
    assert run.main(["newest", "--pythons", "3.11"]) == status
    said = capsys.readouterr().out
    assert f"newest on Python 3.11: {'FAILED' if code else 'PASSED'}: exit status {code}" in said
    assert "  with python 3.11.7, torch 2.13.0" in said
    assert "  NOT TESTED: torch==2.11: ran on torch 2.13" in said
    assert said.endswith("1 ran with a pin replaced\n")


def test_an_outcome_without_detail_is_one_line():
    assert str(Outcome("oldest", "passed")) == "oldest: PASSED"
