"""The one command: what it measures, what it does when something fails, when it stops. Tiny shapes, no GPU."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_suite, op_engines, records
from bench.cases import CASES
from bench.op_engines import eager
from bench.provenance import ROOT
from bench.suite import attention, models, ops, plan, session, steps, summary, tests, train_steps
from bench.suite.model_cases import MODEL_CASES
from bench.tables import table
from tests.bench.suite_runner import LOSS, MODELS, OPS, Runner


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The whole dry run, once: the runner, what was printed, the exit code, what was measured."""
    folder, printed = tmp_path_factory.mktemp("suite"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        runner = Runner(folder, patch)
        code = runner("--profile")
    return runner, printed.getvalue(), code, list(runner.measured)


def test_everything_is_measured_in_the_order_of_its_worth(everything):
    runner, printed, code, measured = everything
    assert code == 0
    assert measured == ["tests", *OPS]
    assert runner.compiled[0] == list(gpu_suite.SECTIONS)
    assert "compiled for sm_90: 3 kernels" in printed
    names = {path.stem for path in runner.records.glob("*.json")}
    assert names == {"tests", *OPS, *MODELS, attention.NAME, LOSS, "plan", "summary"}
    for name in names:
        assert {"device", "torch", "triton", "driver", "date", "sources"} <= runner.record(name)["provenance"].keys()
    header = next(line for line in printed.splitlines() if line.startswith("case "))
    assert header.split() == ["case", "floor", "ms", "ours", "baseline", "x", "target", "met"]
    lines = runner.lines()
    assert list(lines)[: len(OPS)] == OPS
    ours = [f"{MODELS[3]}, K = 0", f"{MODELS[3]}, K = 2", f"{MODELS[3]}, K = 2, {train_steps.EXACT}"]
    encode, train = ([f"{name}, K = {k}" for k in (0, 2)] for name in MODELS[:2])
    assert [name for name in lines if name.startswith(("encode", "train"))] == [*encode, *ours, *train]
    assert [name for name in lines if name.startswith(MODELS[2])] == [
        f"{MODELS[2]}, fused decoder",
        f"{MODELS[2]}, dependent launch",
    ]
    assert {line["met"] for line in lines.values()} == {None, True, False}
    for name, line in lines.items():
        if not name.startswith("plan"):
            assert line["ours"] > 0
            assert line["floor"] > 0
            assert name == f"{MODELS[3]}, K = 0" or line["baseline"] > 0  # only the K of `compared` have a baseline
    assert runner.record("summary")["skipped"] == runner.record("summary")["problems"] == []


def test_records_of_models_are_those_of_run_py(everything):
    """So the documents render them like any other."""
    runner, *_ = everything
    for name, benchmark in zip(MODELS[:2], ("throughput", "training"), strict=True):
        record = runner.record(name)
        assert record["benchmark"] == benchmark
        assert record["agreement"]["verdict"] == "ok"
        assert len(record["agreement"]["checks"]) >= 2
        assert {(point["engine"], point["num_steps"]) for point in record["points"]} == {
            (engine, k) for engine in record["engines"] for k in (0, 2)
        }
        assert records.describe(record)[0].startswith("smollm2-135m (")
        assert "official" in records.report(record) or "recompute" in records.report(record)


def test_the_profile_says_where_the_time_goes(everything):
    runner, *_ = everything
    pages = {path.name: path.read_text() for path in runner.records.glob("profile-*.txt")}
    assert len(pages) == 3
    assert {name.split("-")[1] for name in pages} == {"prefill", "decode", "train"}
    for page in pages.values():
        assert "wall" in page
        assert "launches" in page
        assert "costliest of" in page
        assert "aten::mm" in page
        assert "ncalls" in page
    decode = next(page for name, page in pages.items() if name.startswith("profile-decode"))
    assert "a step of 2: wall" in decode


def test_a_second_call_goes_on(everything, monkeypatch):
    runner = Runner(everything[0].out.parent, monkeypatch)
    before = runner.lines()
    monkeypatch.setattr(models, "_encoding", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(models, "_train", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(ops, "_loss", lambda *_: pytest.fail("measured again"))
    assert runner() == 0
    assert runner.measured == []
    assert runner.lines() == before

    (runner.records / f"{OPS[1]}.json").write_text('{"half a rec')  # as no write of ours leaves it
    assert runner() == 0
    assert runner.measured == [OPS[1]]


def test_other_sources_are_measured_again(suite, monkeypatch):
    assert suite("--only", "ops") == 0
    assert suite("--only", "ops") == 0
    assert suite.measured == []
    assert suite("--only", "tests") == 0
    monkeypatch.setattr(session, "sources_hash", lambda _: "another")
    assert suite("--only", "ops,tests") == 0
    assert suite.measured == ["tests", *OPS]


def test_a_failing_test_costs_no_figure(suite, capsys):
    suite.write_test("assert 1 == 2, 'the kernels are wrong'")
    assert suite("--only", "tests,ops") == 1
    assert suite.measured == ["tests", *OPS]
    assert "the kernels are wrong" in (suite.records / "tests.txt").read_text()
    assert suite.record("tests")["exit_code"] == 1
    (problem,) = suite.record("summary")["problems"]
    assert "tests/gpu failed (exit code 1)" in problem
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "the kernels are wrong" in printed
    assert list(suite.lines()) == OPS

    suite.write_test("assert True")  # a failure is not kept
    assert suite("--only", "tests,ops") == 0
    assert suite.measured == ["tests"]


def test_skipped_tests_are_fine_without_a_gpu(suite):
    suite.real_tests = True
    (suite.tests / "test_it.py").write_text("import pytest\npytest.skip('no GPU', allow_module_level=True)\n")
    assert suite("--only", "tests") == 0
    assert suite.record("tests")["exit_code"] == 5


def test_a_case_that_raises_costs_no_other(suite, monkeypatch):
    def broken(hidden, head, embed=None, **rules):
        if len(hidden) == 5:
            raise RuntimeError("an illegal instruction was encountered\nand more")
        return eager(hidden, head, embed, "top_k" if rules else "")

    monkeypatch.setattr(op_engines, "soft_embed", broken)
    assert suite("--only", "ops,loss") == 1
    assert list(suite.lines()) == [OPS[0], *OPS[2:], LOSS]
    assert suite.record("summary")["problems"] == [f"{OPS[1]}: RuntimeError: an illegal instruction was encountered"]
    assert "in broken" in (suite.records / f"{OPS[1]}-error.txt").read_text()


def test_the_table_is_there_after_an_interruption(suite, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run_loss", interrupted)
    assert suite("--only", "ops,loss") == 1
    assert list(suite.lines()) == OPS
    assert suite.record("summary")["problems"] == ["interrupted"]


def test_a_section_that_raises_costs_no_other(suite, monkeypatch):
    monkeypatch.setattr(ops, "run_loss", lambda *_: 1 / 0)
    assert suite("--only", "loss,plan,ops") == 1
    assert {*OPS} < suite.lines().keys()
    assert any(name.startswith("plan") for name in suite.lines())
    assert suite.record("summary")["problems"] == ["loss: ZeroDivisionError: division by zero"]


def test_a_wrong_result_is_shown_and_marked(suite, monkeypatch, capsys):
    right = op_engines.soft_embed

    def wrong(hidden, head, embed=None, **rules):
        return eager(hidden, head, embed, "top_k" if rules else "") * (1.01 if len(hidden) == 7 else 1.0)

    monkeypatch.setattr(op_engines, "soft_embed", wrong)
    assert suite("--only", "ops") == 1
    (problem,) = suite.record("summary")["problems"]
    assert problem.startswith(f"{OPS[2]}: WRONG: ")
    line = suite.lines()[OPS[2]]
    assert line["ours"] > 0
    assert line["met"] is False  # although its bound is reached
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith(OPS[2]))
    assert row.split()[-1] == "WRONG"

    monkeypatch.setattr(op_engines, "soft_embed", right)  # what was wrong is measured again, the rest is not
    assert suite("--only", "ops") == 0
    assert suite.measured == [OPS[2]]


def test_a_wrong_loss_is_shown_and_marked(suite, monkeypatch):
    def wrong(*_):
        raise op_engines.WrongResultError("relative error 0.5")

    monkeypatch.setattr(ops.info_nce, "check", wrong)
    assert suite("--only", "loss") == 1
    assert suite.record("summary")["problems"] == [f"{LOSS}: WRONG: relative error 0.5"]
    assert suite.lines()[LOSS]["ours"] > 0


def test_a_plan_that_was_off_is_a_problem_every_time(suite, monkeypatch):
    errors, checked = [0.2], []

    def check(case, device):
        checked.append(case)
        return {"error": errors[0]}

    monkeypatch.setattr(plan.plan_check, "check", check)
    for _ in range(2):
        checked.clear()
        assert suite("--only", "plan") == 1
        assert len(checked) == 2
    errors[0] = -0.1
    assert suite("--only", "plan") == 0
    checked.clear()
    assert suite("--only", "plan") == 0
    assert checked == []
    assert "plan of 2 steps: worst error -10.0%" in suite.lines()


def test_what_does_not_fit_is_named_and_a_second_call_goes_on(suite, capsys):
    assert suite("--minutes", "0.0001") == 0
    assert suite.measured == []
    skipped = suite.record("summary")["skipped"]
    encoding, training, step, train = MODELS  # in the order of their worth, but one shape after the other
    plans = [f"plan {case.shape}" for case in plan.plan_check.SMOKE_CASES]
    assert skipped == ["tests", *OPS, encoding, step, train, training, attention.NAME, LOSS, *plans]
    printed = capsys.readouterr().out
    assert f"skipped: {OPS[0]} takes about" in printed
    assert f"no time for: tests, {OPS[0]}" in printed
    assert suite("--only", "ops") == 0
    assert suite.measured == OPS


def test_tests_without_end_are_stopped_with_their_processes(suite):
    marker = suite.tests / "alive"
    child = f"import time; [(open({str(marker)!r}, 'a').write('x'), time.sleep(0.1)) for _ in range(300)]"
    suite.write_test(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    suite.real_tests = True
    before = tests._SECONDS
    try:
        tests._SECONDS = 6.0
        assert suite("--only", "tests,ops") == 1
    finally:
        tests._SECONDS = before
    assert suite.record("tests")["exit_code"] == tests.TIMED_OUT
    assert list(suite.lines()) == OPS
    size = marker.stat().st_size if marker.exists() else 0
    assert suite("--only", "loss") == 0  # some time passes
    assert (marker.stat().st_size if marker.exists() else 0) <= size + 1


def test_kernels_that_do_not_compile_are_problems(suite, capsys):
    suite.counts = {**suite.counts, "failed": ["one_pass_kernel: PTXASError: no registers"], "unfinished": 2}
    assert suite("--only", "ops") == 1
    assert suite.record("summary")["problems"] == ["not compiled: one_pass_kernel: PTXASError: no registers"]
    assert "2 not in time" in capsys.readouterr().out
    assert list(suite.lines()) == OPS


def test_the_table_fits_on_one_screen():
    """Of the full run, with every target and wide numbers."""
    times = {"floor": 12.34567, "ours": 1234.567, "baseline": 1234.567, "speedup": 12.345}
    lines = [case.target.judge({"case": case.name, **times}) for case in CASES]
    for case in MODEL_CASES:
        ways = (steps.OURS, "dependent launch") if case.section == "step" else [f"K = {k}" for k in case.targets]
        target = max(case.targets.values(), key=lambda target: len(str(target)))
        ways = [*ways, f"K = {case.compared[-1]}, {train_steps.EXACT}"] if case.exact is not None else ways
        lines += [target.judge({"case": f"{case.name}, {way}", **times}) for way in ways]
    lines += [
        ops.LOSS_TARGET.judge({"case": f"info_nce-B{s.rows}-M{s.candidates}-D{s.width}", **times}) for s in ops.SIZES
    ]
    worst = f"{attention.NAME}, worst of 80: 16x16x256x8192"
    lines.append(attention.TARGET.judge({"case": worst, **times}))
    lines.append({"case": "plan of 5 steps: worst error +12.3%", "target": "within 15%", "met": True})
    text = table(summary.COLUMNS, lines).splitlines()
    assert len(text) <= 66
    assert max(map(len, text)) <= 128


@pytest.mark.parametrize(("name", "index"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_is_chosen_where_it_has_a_number(suite, monkeypatch, name, index):
    """PyTorch's `set_device` refuses "cuda" without a number, which is the default."""
    chosen = []
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(ops, "run", lambda _: None)
    assert suite("--only", "ops", "--device", name) == 0
    assert chosen == index
    assert (suite.out / "some-gpu" / "summary.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--device: got 'cuda', but PyTorch sees no GPU; --smoke"),
        (["--out", "x", "--device", "cpu"], "--device: got 'cpu', expected cuda, or cpu with --smoke"),
        (["--out", "x", "--smoke", "--minutes", "0"], "--minutes: got 0"),
        (["--out", "x", "--smoke", "--jobs", "0"], "--jobs: got 0"),
        (["--out", "x", "--smoke", "--only", "ops,speed"], "--only: got 'speed', expected some of ops, engine"),
        (["--out", "x", "--smoke", "--candidates", "none.json"], "--candidates: none.json"),
        (["--smoke"], "--out"),
        (["--out", f"{__file__}/x", "--smoke"], "--out: [Errno 20] Not a directory"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu_suite.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_from_a_shell_elsewhere(tmp_path):
    """A plain checkout, no PYTHONPATH, another working directory; and the kernels compiled for sm_90 without a GPU,
    which the second call finds in the cache."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--out", "o", "--smoke", "--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = run("--only", "ops", "--jobs", "2")
    assert re.search(r"\d of \d+ targets met, 0 skipped, 0 problems", printed)
    assert {path.name for path in (tmp_path / "o" / "cpu").iterdir()} >= {f"{OPS[2]}.json", "summary.json"}
    (counted,) = (line for line in printed.splitlines() if line.startswith("compiled for sm_90"))
    assert " 0 were there" in counted
    kernels = int(counted.split()[3])
    assert kernels >= 4
    assert f"{kernels} kernels in" in counted
    again = run("--only", "ops", "--compile-only")
    assert json.loads(again.splitlines()[-1]) | {"seconds": 0} == {
        "kernels": kernels, "compiled": 0, "cached": kernels, "failed": [], "unfinished": 0, "seconds": 0,
    }  # fmt: skip
