"""Runs the GPU suite's dry run in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu_suite
from bench.cases import SMOKE_CASES
from bench.shapes import SHAPES
from bench.suite import ops, precompile, session, tests
from bench.suite.model_cases import SMOKE_MODEL_CASES
from gircse.roofline import Ceilings

OPS = [case.name for case in SMOKE_CASES]
MODELS = [case.name for case in SMOKE_MODEL_CASES]
LOSS = "info_nce-B40-M80-D24"
COMPILED = {"kernels": 3, "compiled": 3, "cached": 0, "failed": [], "unfinished": 0, "seconds": 1.0}


class Runner:
    """Runs main() with --smoke in this process. Nothing is compiled beforehand; `tests/gpu` is a folder of its own,
    whose tests are taken to pass unless `write_test` says otherwise."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.out, self.tests = folder / "out", folder / "tests"
        self.records = self.out / "cpu"
        self.measured: list[str] = []
        self.compiled: list[list[str]] = []
        self.counts: dict = COMPILED
        self.tests.mkdir(exist_ok=True)
        self.real_tests = False
        self.write_test("assert True")
        measure, run_command = ops.measure, tests.run_command
        # most of a one-layer model is its vocabulary, which decides nothing here but the time
        patch.setitem(SHAPES[SMOKE_MODEL_CASES[0].shape].settings, "vocab_size", 2048)
        patch.setattr(tests, "FOLDER", self.tests)
        patch.setattr(session, "measure_ceilings", lambda *_, **__: Ceilings(1e11, 1e10))
        patch.setattr(precompile, "run", lambda sections, *_, **__: self.compiled.append(sections) or self.counts)

        def counted(case, *args, **kwargs):
            self.measured.append(case.name)
            return measure(case, *args, **kwargs)

        def run_or_pretend(command: list[str], seconds: float) -> tuple[int, str]:
            self.measured.append("tests")
            return run_command(command, seconds) if self.real_tests else (0, "=== 1 passed in 0.01s ===")

        patch.setattr(ops, "measure", counted)
        patch.setattr(tests, "run_command", run_or_pretend)

    def write_test(self, body: str) -> None:
        self.real_tests = body != "assert True"
        (self.tests / "test_it.py").write_text(f"def test_it():\n    {body}\n")

    def __call__(self, *arguments: str) -> int:
        self.measured.clear()
        return gpu_suite.main(["--out", str(self.out), "--smoke", *arguments])

    def record(self, name: str) -> dict:
        return json.loads((self.records / f"{name}.json").read_text())

    def lines(self) -> dict[str, dict]:
        return {line["case"]: line for line in self.record("summary")["lines"]}
