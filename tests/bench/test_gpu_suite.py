"""The one command: what it measures, when it stops, what it does not measure again. Tiny shapes, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_suite, op_measure
from bench.cases import SMOKE_CASES
from bench.engine_cases import ENGINE_CASES, SMOKE_ENGINE_CASES
from bench.op_engines import eager
from bench.options import parse
from bench.provenance import ROOT
from gircse.floors import Ceilings

NAMES = [case.name for case in SMOKE_CASES]
THROUGHPUT = "throughput-smollm2-135m"
ENGINE, TRAINING = "engine-smoke", "training-smoke"


class Runner:
    """Runs main() with --smoke. `bench/run.py` is replaced, and so are the tests of `tests/gpu`: by those in a folder
    where `real_tests` is set, else by a line that says that they passed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.tests = folder / "out", folder / "tests"
        self.records = self.out / "cpu"
        self.measured: list[str] = []
        self.commands: list[list[str]] = []
        self.throughput_code, self.real_tests, self.plan_met = 0, False, True
        self.tests.mkdir()
        self.write_test("assert True")
        run, measure = gpu_suite._run, gpu_suite.measure
        monkeypatch.setattr(gpu_suite, "TESTS", self.tests)
        monkeypatch.setattr(gpu_suite, "measure_ceilings", lambda *_, **__: Ceilings(1e11, 1e10))

        def counted(case, *args, **kwargs):
            self.measured.append(case.name)
            return measure(case, *args, **kwargs)

        def run_or_pretend(command: list[str], seconds: float) -> tuple[int, str]:
            self.commands.append(command)
            if "pytest" in command and not self.real_tests:
                return 0, "=== 1 passed in 0.01s ==="
            if "pytest" in command:
                return run([*command, "-p", "no:cacheprovider"], seconds)
            if self.throughput_code == 0:
                record = {"benchmark": "throughput", "provenance": gpu_suite.provenance("cpu")}
                Path(command[command.index("--out") + 1]).write_text(json.dumps(record | {"met": self.plan_met}))
            return self.throughput_code, "a table\n{}"

        monkeypatch.setattr(gpu_suite, "measure", counted)
        monkeypatch.setattr(gpu_suite, "_run", run_or_pretend)

    def write_test(self, body: str) -> None:
        self.real_tests = body != "assert True"
        (self.tests / "test_it.py").write_text(f"def test_it():\n    {body}\n")

    def __call__(self, *arguments: str) -> int:
        self.measured.clear()
        self.commands.clear()
        return gpu_suite.main(["--out", str(self.out), "--smoke", *arguments])

    def record(self, name: str) -> dict:
        return json.loads((self.records / f"{name}.json").read_text())


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Runner:
    return Runner(tmp_path, monkeypatch)


def test_everything_in_order_and_nothing_twice(suite, capsys, monkeypatch):
    assert suite() == 0
    assert suite.measured == NAMES
    assert [command[1:3] for command in suite.commands] == [
        ["-m", "pytest"],
        [str(ROOT / "bench/info_nce.py"), "--smoke"],
        [str(ROOT / "bench/run.py"), "--shape"],
        [str(ROOT / "bench/plan_check.py"), "--smoke"],
        [str(ROOT / "bench/run.py"), "--shape"],
        [str(ROOT / "bench/run.py"), "--train"],
    ]
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if line.startswith("case "))
    assert all(word in header for word in ("ours ms", "floor ms", "x eager", "x compiled", "target", "met"))
    assert "1 passed" in printed
    for name in NAMES:
        record = suite.record(name)
        assert {"device", "torch", "triton", "driver", "date", "sources"} <= record["provenance"].keys()
        assert set(record["engines"]) == {"eager", "compiled", "ours"}
        assert record["compile_backend"] == "aot_eager"
    summary = suite.record("summary")
    assert [record["case"] for record in summary["cases"]] == NAMES
    # the cases of the engine and of training have no points here: a figure that cannot be measured is not met
    assert (summary["met"], summary["with_target"]) == (2, 5)
    assert list(summary["engine"]) == [ENGINE, TRAINING]
    for lines in summary["engine"].values():
        assert all(line.endswith("not measured, NOT met") for line in lines)
    assert summary["skipped"] == summary["problems"] == []

    assert suite() == 0  # again: nothing is run, the summary is the same
    assert suite.measured == suite.commands == []
    again = suite.record("summary")
    assert again["cases"] == summary["cases"]

    (suite.records / f"{NAMES[1]}.json").write_text('{"half a rec')  # as no write of ours leaves it
    (suite.records / f"{THROUGHPUT}.json").unlink()
    assert suite() == 0
    assert suite.measured == [NAMES[1]]
    assert len(suite.commands) == 1

    provenance = gpu_suite.provenance
    monkeypatch.setattr(gpu_suite, "provenance", lambda device: {**provenance(device), "sources": "another"})
    assert suite() == 0
    assert suite.measured == NAMES
    assert len(suite.commands) == 6
    assert suite.record(NAMES[0])["provenance"]["sources"] == "another"


def test_another_engine_is_measured_again(suite, monkeypatch):
    assert suite("--only", "engine") == 0
    assert len(suite.commands) == 2  # the tests and the engine's case
    monkeypatch.setattr(gpu_suite, "engine_hash", lambda: "another")
    assert suite("--only", "engine") == 0
    assert len(suite.commands) == 1


def test_changed_tests_run_again(suite):
    assert suite("--only", "nothing") == 0
    suite.write_test("assert 1")
    assert suite("--only", "nothing") == 0
    assert len(suite.commands) == 1


def test_a_failing_test_stops_everything(suite, capsys):
    suite.write_test("assert 1 == 2, 'the kernels are wrong'")
    assert suite() == 1
    assert suite.measured == []
    assert len(suite.commands) == 1
    assert sorted(path.name for path in suite.records.iterdir()) == ["tests.json", "tests.txt"]
    assert "the kernels are wrong" in (suite.records / "tests.txt").read_text()
    assert suite.record("tests")["exit_code"] == 1
    printed = capsys.readouterr().out
    assert "the kernels are wrong" in printed
    assert "nothing is measured" in printed

    suite.write_test("assert True")  # a failure is not kept
    assert suite("--only", NAMES[0]) == 0
    assert suite.measured == [NAMES[0]]


def test_skipped_tests_are_fine_without_a_gpu(suite):
    suite.real_tests = True
    (suite.tests / "test_it.py").write_text("import pytest\npytest.skip('no GPU', allow_module_level=True)\n")
    assert suite("--only", "nothing") == 0
    assert suite.record("tests")["exit_code"] == 5


def test_eager_out_of_memory_is_recorded(suite, monkeypatch, capsys):
    def too_big(hidden, head, embed):
        if len(hidden) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return eager(hidden, head, embed)

    monkeypatch.setattr(op_measure, "eager", too_big)
    assert suite("--only", "tiny-untied") == 0
    record = suite.record(NAMES[2])
    assert record["rows"] == 7
    assert record["engines"]["eager"] is None
    assert record["failures"] == {"eager": "out of memory"}
    assert record["speedup_over_eager"] is None
    assert record["engines"]["ours"]["milliseconds"] > 0
    assert "out of memory" in capsys.readouterr().out


def test_wrong_results_are_never_timed(suite, monkeypatch, capsys):
    from bench import op_engines

    def wrong(hidden, head, embed, **_):
        return eager(hidden, head, embed) * (1.01 if len(hidden) == 5 else 1.0)

    monkeypatch.setattr(op_engines, "soft_embed", wrong)
    assert suite() == 1
    assert not (suite.records / f"{NAMES[1]}.json").exists()
    assert (suite.records / f"{NAMES[2]}.json").exists()  # the others keep their turn
    (problem,) = suite.record("summary")["problems"]
    assert problem.startswith(f"{NAMES[1]}: no speed is reported")


def test_a_throughput_run_that_fails(suite):
    suite.throughput_code = 1
    assert suite("--only", "throughput") == 1
    (problem,) = suite.record("summary")["problems"]
    assert "bench/run.py ended with exit code 1" in problem


def test_a_plan_that_was_off_is_checked_again(suite):
    suite.plan_met = False
    for _ in range(2):
        suite("--only", "plan")
        assert [Path(command[1]).name for command in suite.commands if "pytest" not in command] == ["plan_check.py"]
    suite.plan_met = True
    suite("--only", "plan")
    suite("--only", "plan")
    assert suite.commands == []


def test_what_does_not_fit_is_skipped(suite, capsys):
    assert suite("--only", "nothing") == 0  # the tests have passed
    assert suite("--minutes", "0.01") == 0
    assert suite.measured == suite.commands == []
    assert suite.record("summary")["skipped"] == [*NAMES, "info_nce", THROUGHPUT, "plan", ENGINE, TRAINING]
    assert f"skipped: {NAMES[0]} takes about" in capsys.readouterr().out


def test_a_test_run_without_end_is_stopped(suite, capsys):
    suite.write_test("import time; time.sleep(30)")
    assert suite("--minutes", "0.03") == 1
    assert suite.record("tests")["exit_code"] == 124
    assert "no time left" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--device: got 'cuda', but PyTorch sees no GPU; --smoke"),
        (["--out", "x", "--device", "cpu"], "--device: got 'cpu', expected cuda, or cpu with --smoke"),
        (["--out", "x", "--smoke", "--minutes", "0"], "--minutes: got 0"),
        (["--smoke"], "--out"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu_suite.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        gpu_suite.THROUGHPUT,
        gpu_suite.SMOKE_THROUGHPUT,
        *(case.arguments for case in (*ENGINE_CASES, *SMOKE_ENGINE_CASES)),
    ],
)
def test_run_py_takes_these_options(arguments):
    options, _ = parse([*arguments, "--device", "cpu"])
    assert options.shape == arguments[1]


def test_from_a_shell_elsewhere(tmp_path):
    """The real thing but for throughput: a plain checkout, no PYTHONPATH, another working directory, tests/gpu."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--out", "o", "--smoke", "--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, "--only", "tiny-untied"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 targets met, 0 skipped, 0 problems" in done.stdout
    assert {path.name for path in (tmp_path / "o" / "cpu").iterdir()} >= {f"{NAMES[2]}.json", "summary.json"}
