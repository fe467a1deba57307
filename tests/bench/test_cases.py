"""The op benchmarks: floors, targets, and that nothing wrong is ever timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import op_measure, soft_embed
from bench.cases import BOTH, CASES, CPU_CASES, FORWARD, H100, MODELS, SMOKE_CASES, Case, Target
from bench.memory import peak_extra_bytes
from bench.op_engines import Problem, WrongResultError, check, draw_matrices, eager, ours
from bench.op_measure import judge, measure
from bench.provenance import ROOT
from bench.timing import interleaved
from gircse.floors import Ceilings

CEILINGS = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)
CPU = torch.device("cpu")

# microseconds at 3.0 TB/s and 790 TFLOP/s, worked out by hand: T = 1, 64, 256, 1024
FLOORS = {
    "smollm2-135m": (19, 19, 37, 147),
    "qwen2.5-0.5b": (91, 91, 176, 706),
    "qwen3-0.6b": (104, 104, 202, 807),
    "llama-3.2-1b": (175, 175, 340, 1362),
    "qwen3-4b": (259, 259, 504, 2017),
    "mistral-7b": (175, 175, 176, 680),
    "qwen2.5-7b": (727, 727, 728, 2826),
}


@pytest.mark.parametrize("model", FLOORS)
def test_floors_on_an_h100(model):
    for rows, microseconds in zip((1, 64, 256, 1024), FLOORS[model], strict=True):
        assert Case(model, rows).floor(H100) * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_forward_and_backward_are_ten_tvd():
    vocab, width, _ = MODELS["qwen2.5-0.5b"]
    case = Case("qwen2.5-0.5b", 1024, BOTH)
    assert sum(work.flops for work in case.work()) == 10 * 1024 * vocab * width
    assert case.floor(H100) == pytest.approx(10 * 1024 * vocab * width / 790e12)
    # few rows: both passes read the matrix
    assert Case("qwen2.5-0.5b", 1, BOTH).floor(H100) == pytest.approx(2 * 2 * vocab * width / 3e12)
    assert Case("qwen2.5-0.5b", 1, dtype="float32").floor(H100) == pytest.approx(4 * vocab * width / 3e12)


def test_the_list_holds_every_line_of_the_targets_in_their_order():
    names = [case.name for case in (*CASES, *CPU_CASES, *SMOKE_CASES)]
    assert len(set(names)) == len(names)
    lines = [
        ([True], [1, 16, 64], Target(over_floor=1.25, over_best=1.7)),
        ([True], [256], Target(over_eager=2.0)),
        ([False], [1, 16, 64], Target(over_floor=1.2, over_eager=1.1)),
        ([True, False], [1024, 4096], Target(over_floor=1.35, over_eager=1.0)),
    ]
    start = 0
    for tied, rows, target in lines:
        found = [i for i, case in enumerate(CASES) if case.what == FORWARD and case.target == target]
        assert found == list(range(start, start + len(found)))
        assert {(CASES[i].matrices.tied, CASES[i].rows) for i in found} == {(t, r) for t in tied for r in rows}
        start += len(found)

    both = {case.model: case.target for case in CASES if (case.rows, case.what) == (1024, BOTH)}
    assert both["llama-3.2-1b"] == Target(over_eager=1.0)
    assert both["mistral-7b"] == Target(over_eager=0.8)
    assert both["qwen2.5-0.5b"] == Target(over_eager=1.0, memory_ratio=0.05)
    assert {case.target for case in CASES if case.rows == 65536} == {Target(extra_bytes=1e9)}
    assert not any(str(case.target) for case in CASES[-8:])


def test_targets():
    target = Target(over_floor=1.25, over_best=1.7)
    record = {"over_floor": 1.25, "speedup_over_best": 1.7}
    assert target.misses(record) == []
    assert target.misses({**record, "over_floor": 1.3}) == ["<= 1.25x floor: 1.3"]
    assert target.misses({"over_floor": 2.0, "speedup_over_best": 1.0}) == ["<= 1.25x floor: 2", ">= 1.7x best: 1"]
    assert target.misses({**record, "speedup_over_best": None}) == []  # nothing else could run
    assert Target(extra_bytes=1e9).misses({"extra_bytes": 2_000_000_000}) == ["< 1 GB extra: 2e+09"]
    assert Target(over_eager=1.0).misses({"speedup_over_eager": float("nan")}) != []
    assert Target().misses({}) == []
    assert str(target) == "<= 1.25x floor, >= 1.7x best"


def _problem(what: str = BOTH, rows: int = 50, model: str = "tiny-untied") -> Problem:
    return Problem.draw(rows, what, *draw_matrices(MODELS[model], torch.float32, CPU))


@pytest.mark.parametrize("model", ["tiny-tied", "tiny-untied"])
@pytest.mark.parametrize("what", [FORWARD, BOTH])
def test_check_passes_what_is_right(model, what):
    found = check(_problem(what, model=model), ours)
    assert found["rows"][0] == 0
    assert found["rows"][-1] == 49
    assert found["errors"]["ours"].keys() == ({"values"} if what == FORWARD else {"values", "gradient"})
    assert found["worst_ratio"] > 0


def test_logits_have_the_spread_of_models():
    problem = _problem(rows=200, model="tiny-tied")
    assert (problem.hidden @ problem.head.T).std().item() == pytest.approx(3, rel=0.1)


def _cold(hidden, head, embed):
    return eager(hidden / 1.001, head, embed)


def _wrong_in_late_rows(hidden, head, embed):
    out = eager(hidden, head, embed)
    return torch.cat([out[:32], out[32:] * 1.001])


def _nan(hidden, head, embed):
    return eager(hidden, head, embed) * float("nan")


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def _nan_gradient(hidden, head, embed):
    return eager(_NanGradient.apply(hidden), head, embed)


def _half_gradient(hidden, head, embed):
    return eager(hidden / 2 + hidden.detach() / 2, head, embed)


@pytest.mark.parametrize("wrong", [_cold, _wrong_in_late_rows, _nan, _nan_gradient, _half_gradient])
def test_check_refuses_what_is_wrong(wrong):
    with pytest.raises(WrongResultError, match="no speed is reported at T = 50, forward\\+backward: got .* expected"):
        check(_problem(), wrong)


def _measure(case: Case, **options):
    matrices = draw_matrices(case.matrices, case.torch_dtype, CPU)
    return judge(measure(case, *matrices, CEILINGS, compile_backend="aot_eager", budget=0.02, **options), case)


def test_a_record():
    case = Case("tiny-tied", 37, BOTH, "float32", Target(over_floor=1e9, over_eager=1e9))
    record = _measure(case)
    mine, theirs, other = (record["engines"][name]["milliseconds"] for name in ("ours", "eager", "compiled"))
    assert record["floor_milliseconds"] == pytest.approx(case.floor(CEILINGS) * 1e3)
    assert record["over_floor"] == pytest.approx(mine / record["floor_milliseconds"])
    assert record["speedup_over_eager"] == pytest.approx(theirs / mine)
    assert record["speedup_over_compiled"] == pytest.approx(other / mine)
    assert record["speedup_over_best"] == pytest.approx(min(theirs, other) / mine)
    assert record["memory_ratio"] == record["extra_bytes"] / record["engines"]["eager"]["peak_extra_bytes"]
    assert record["met"] is False
    assert len(record["misses"]) == 1
    assert record["targets"] == {"over_floor": 1e9, "over_eager": 1e9}
    assert record["replay"] is None
    assert json.loads(json.dumps(record)) == record


def test_what_cannot_run_is_null(monkeypatch):
    def too_big(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    def no_compiler(*_):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand many more lines")

    monkeypatch.setattr(op_measure, "eager", too_big)
    monkeypatch.setattr(op_measure, "compiled", lambda backend: no_compiler)
    record = _measure(replace(SMOKE_CASES[0], target=Target(over_eager=2.0, extra_bytes=1e9)))
    assert record["engines"]["eager"] is None
    assert record["engines"]["compiled"] is None
    assert record["failures"]["eager"] == "out of memory"
    assert record["failures"]["compiled"].endswith("no working C++ compiler")
    assert record["speedup_over_eager"] is record["speedup_over_best"] is record["memory_ratio"] is None
    assert record["met"] is True
    assert record["engines"]["ours"]["milliseconds"] > 0


@pytest.mark.parametrize(("name", "error"), [("eager", RuntimeError("shapes")), ("ours", torch.OutOfMemoryError("!"))])
def test_other_failures_are_raised(monkeypatch, name, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(op_measure, name, broken)
    with pytest.raises(type(error)):
        _measure(SMOKE_CASES[0])


def test_peak_memory_on_the_cpu():
    def run():
        first = torch.ones(1 << 20)  # 4 MiB
        second = first + first  # 8
        del first
        third = second + second  # 8 again
        return third[:1].clone()

    run()
    assert peak_extra_bytes(run, CPU) == pytest.approx(8 << 20, rel=1e-3)
    rows, vocab = 64, MODELS["small-untied"].vocab
    problem = _problem(FORWARD, rows, "small-untied")
    assert peak_extra_bytes(problem.call(eager), CPU) >= 2 * rows * vocab * 4
    assert peak_extra_bytes(problem.call(ours), CPU) < 2 * rows * vocab * 4


def test_runs_take_turns():
    order = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 3)
    assert order == list("ababab")
    assert [len(timing.runs) for timing in found.values()] == [3, 3]


def _no_compiler(*_):
    raise RuntimeError("no C++ compiler")


def test_soft_embed_command_keeps_its_record(monkeypatch, tmp_path, capsys):
    out = tmp_path / "record.json"
    arguments = ["--shape", "tiny-tied", "--rows", "1", "5", "--repeats", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["soft_embed.py", *arguments, "--out", str(out)])
    monkeypatch.setattr(soft_embed, "peak_of", lambda *_: 1 << 20)
    monkeypatch.setattr(soft_embed, "compiled", lambda: _no_compiler)
    assert soft_embed.main() == 0
    record = json.loads(out.read_text())
    published = json.loads((ROOT / "bench" / "results" / "soft_embed-cpu.json").read_text())
    assert record.keys() >= published.keys()
    assert record["points"][0].keys() >= published["points"][0].keys()
    assert all(point["floor_milliseconds"] > 0 for point in record["points"])
    assert record["failures"]["compiled, T = 5, forward"] == "RuntimeError: no C++ compiler"
    assert [(p["rows"], p["pass"]) for p in record["points"]] == [(1, FORWARD), (1, BOTH), (5, FORWARD), (5, BOTH)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record

    monkeypatch.setattr(sys, "argv", ["soft_embed.py", *arguments, "--peak-of", "eager", BOTH, "5"])
    assert soft_embed.main() == 0
    assert int(capsys.readouterr().out) >= 0

    monkeypatch.setattr(sys, "argv", ["soft_embed.py", *arguments, "--no-compile"])
    monkeypatch.setitem(soft_embed.OPS, "ours", _cold)
    monkeypatch.setattr(soft_embed, "check", lambda problem: check(problem, _cold))
    with pytest.raises(SystemExit, match="no speed is reported"):
        soft_embed.main()


def test_pytest_bench_writes_json(tmp_path, monkeypatch):
    """Run inside this process: another one would spend seconds on imports alone."""
    pytest.importorskip("pytest_benchmark")
    from bench import test_soft_embed

    monkeypatch.setattr(test_soft_embed, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(test_soft_embed, "compiled", lambda: pytest.fail("an inductor compilation takes too long here"))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # in which nothing would be timed
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "bench.json"
    without = [word for plugin in ("cacheprovider", "timeout", "xdist") for word in ("-p", f"no:{plugin}")]
    command = [str(ROOT / "bench"), "-q", *without, "--benchmark-json", str(out)]
    assert pytest.main([*command, "-k", "small-untied-T48-forward-float32 and not compiled"]) == 0
    found = json.loads(out.read_text())["benchmarks"]
    assert {b["extra_info"]["engine"] for b in found} == {"eager", "ours"}
    assert {b["group"] for b in found} == {"small-untied-T48-forward-float32"}
    assert all(b["extra_info"]["peak_extra_bytes"] > 0 and b["extra_info"]["floor_seconds"] > 0 for b in found)


def test_pytest_bench_skips_what_cannot_be_compiled():
    from bench.test_soft_embed import _warm_up

    def broken():
        raise RuntimeError("InvalidCxxCompiler: none\nmore")

    with pytest.raises(pytest.skip.Exception, match="torch.compile: InvalidCxxCompiler: none$"):
        _warm_up("compiled", broken)
    for name in ("eager", "ours"):
        with pytest.raises(RuntimeError):
            _warm_up(name, broken)
