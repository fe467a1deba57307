"""Do the tests of `gircse/ops` notice when the code is wrong? `make mutation` draws mutants and runs the tests on each.

First the tests run once as they are: how long each takes, and which lines it reaches. Then every mutant gets the tests
that reach its line, the quickest first, until one fails. Mutants run one by one in a copy of the sources, in forks of a
process that has imported what is slow to import.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import coverage
import hypothesis
import pytest
import torch
import transformers.generation.logits_process  # noqa: F401 - once, not in every fork
import triton.language  # noqa: F401

from tests.mutation.mutants import Mutant, sample

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gircse" / "ops"
TESTS = "tests/ops"
NOT_NOTICED = "survived", "not reached"


class Baseline:
    """What the tests do to the code as it is."""

    def __init__(self, folder: Path) -> None:
        self.durations: dict[str, float] = json.loads((folder / "durations.json").read_text())
        data = coverage.CoverageData(str(folder / "coverage"))
        data.read()
        self._reached: dict[str, dict[int, list[str]]] = {
            Path(file).name: data.contexts_by_lineno(file) for file in data.measured_files()
        }

    def tests(self, mutant: Mutant, seconds: float) -> list[str]:
        """Those that reach the mutant's line, the quickest first, as many as take `seconds` together.

        A line that runs while its module is imported belongs to no test: then all tests of the file. One that nothing
        reaches may be for the processes that some tests start, where nobody counts: then those.
        """
        lines = self._reached.get(mutant.path.name, {})
        contexts = set(lines.get(mutant.line, [])) or self._around(mutant, lines)
        found = {context.rsplit("|", 1)[0] for context in contexts if context}
        if contexts and not found:
            found = {context.rsplit("|", 1)[0] for names in lines.values() for context in names if context}
        if not found:
            return [name for name in self.durations if name.split("[")[0] in with_processes()]
        chosen, total = [], 0.0
        for name in sorted(found & self.durations.keys(), key=lambda name: (self.durations[name], name)):
            total += self.durations[name]
            if chosen and total > seconds:
                break
            chosen.append(name)
        return chosen

    def _around(self, mutant: Mutant, lines: dict[int, list[str]]) -> set[str]:
        """Of the innermost statement: one of several lines is recorded under some of them."""
        tree = ast.parse(mutant.path.read_text(encoding="utf-8"))
        statements = (node for node in ast.walk(tree) if isinstance(node, ast.stmt))
        holding = [node for node in statements if node.lineno <= mutant.line <= (node.end_lineno or 0)]
        first = max((node.lineno for node in holding), default=mutant.line)
        return {name for line in range(first, mutant.line) for name in lines.get(line, [])}


@functools.cache
def with_processes() -> set[str]:
    """The tests that start processes of their own, as pytest names them, without parameters."""
    return {
        f"{TESTS}/{file.name}::{node.name}"
        for file in (ROOT / TESTS).glob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and "in_processes(" in ast.unparse(node)
    }


class Durations:
    """A plugin of pytest that notes the seconds of every test that passes; a skipped or failed one notices nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.others: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.others.add(report.nodeid)

    def passed(self) -> dict[str, float]:
        return {name: seconds for name, seconds in self.seconds.items() if name not in self.others}


def in_fork(work: Callable[[], int], seconds: float, log: Path) -> int | None:
    """The exit status of `work` in a process of its own, its output in `log`; None when it had to be killed.

    `seconds` are of its processor: a busy machine changes no verdict. One that waits for ever gets ten times as many.
    """
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (round(seconds), round(seconds)))
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 70
        try:
            status = int(work())
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + 10 * seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def copied(tree: Path) -> None:
    """Everything that the tests need, anew; mutants are written here and nowhere else."""
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("gircse", "kernels", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)


def run_tests(*arguments: str, plugins: list[Any] | None = None) -> int:
    """Pytest in the working folder's copy of the sources, of which this process has imported nothing."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "kernels")]
    return pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=plugins)


def measure(folder: Path, select: str) -> Baseline:
    """Runs all tests once, unless `folder` has their record already."""

    def tests() -> int:
        os.environ["COVERAGE_FILE"] = str(folder / "coverage")
        plugin = Durations()
        options = ["--cov=gircse.ops", "--cov-context=test", "--cov-report=", "--cov-fail-under=0"]
        code = run_tests(*options, "-k", select, TESTS, plugins=[plugin])
        (folder / "durations.json").write_text(json.dumps(plugin.passed()))
        return code

    if not (folder / "durations.json").exists() and (code := in_fork(tests, 3600, folder / "baseline.txt")) != 0:
        print(f"pytest ended with {code} without a mutant: what failed is not used, see {folder / 'baseline.txt'}")
    return Baseline(folder)


def verdict_of(mutant: Mutant, tests: list[str], seconds: float, tree: Path, log: Path) -> str:
    """killed, timed out, survived, not reached, or no change."""
    source, original = mutant.source(), mutant.path.read_text(encoding="utf-8")
    if source is None or source == original:
        return "no change"
    if not tests:
        return "not reached"
    place = tree / mutant.path.relative_to(ROOT)
    place.write_text(source, encoding="utf-8")
    try:
        code = in_fork(lambda: run_tests("-x", "-p", "no:xdist", "--no-header", *tests), seconds, log)
    finally:
        place.write_text(original, encoding="utf-8")
    if code is None:
        return "timed out"
    return "survived" if code == 0 else "killed"


def main(argv: list[str] | None = None) -> int:
    """0 whatever the verdicts are: they are for reading."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sample", type=int, default=200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--only", nargs="*", default=[], help="files of gircse/ops, e.g. pooling.py")
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests for each mutant, as they run unchanged")
    parser.add_argument("--select", default="", help="tests to take, as pytest's -k, e.g. 'not triton' for speed")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mutation", help="folder of the results")
    options = parser.parse_args(argv)
    options.output, tree = options.output.resolve(), options.output.resolve() / "tree"
    copied(tree)
    os.chdir(tree)
    sys.dont_write_bytecode = True  # a mutant of the same size in the same second would be taken for the last one
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    torch.set_num_threads(1)
    # a test that fails has said enough: no smaller example is looked for, and none is kept for later
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", phases=phases, database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    assert not any(name.startswith("gircse") for name in sys.modules)  # a fork imports its own, changed
    paths = [PACKAGE / name for name in options.only] or list(PACKAGE.glob("*.py"))
    baseline = measure(options.output, options.select)
    results = options.output / f"sample-{options.sample}-seed-{options.seed}.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    chosen = sample(paths, options.sample, options.seed)
    for number, mutant in enumerate(chosen[len(done) :], start=len(done) + 1):
        tests = baseline.tests(mutant, options.seconds)
        allowed = 30 + 5 * sum(baseline.durations[name] for name in tests)
        verdict = verdict_of(mutant, tests, allowed, tree, options.output / "last.txt")
        entry = {
            "file": mutant.path.name, "line": mutant.line, "operator": mutant.operator.removeprefix("core/"),
            "verdict": verdict, "tests": len(tests), "diff": mutant.diff(),
        }  # fmt: skip
        done.append(entry)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{number}/{len(chosen)} {entry['file']}:{entry['line']} {verdict}", flush=True)
    print(summary(done))
    return 0


def summary(done: list[dict[str, Any]]) -> str:
    """A table by file, and every mutant that no test noticed."""
    lines = [f"{'file':<24}{'mutants':>8}{'noticed':>8}"]
    for name in sorted({entry["file"] for entry in done}):
        verdicts = Counter(entry["verdict"] for entry in done if entry["file"] == name)
        total = verdicts.total() - verdicts["no change"]
        lines.append(f"{name:<24}{total:>8}{total - sum(verdicts[v] for v in NOT_NOTICED):>8}")
    lines += [
        f"\n{entry['file']}:{entry['line']} {entry['operator']} {entry['verdict']}\n{entry['diff']}"
        for entry in done
        if entry["verdict"] in NOT_NOTICED
    ]
    verdicts = Counter(entry["verdict"] for entry in done)
    lines.append("\nmutants: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
