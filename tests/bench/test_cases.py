"""The op benchmarks: floors, targets, and that nothing wrong is ever timed."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bench import op_measure, soft_embed
from bench.agreement import OK, UNCHECKED, WRONG
from bench.cases import BOTH, CASES, COMPILED, FORWARD, H100, MODELS, SMOKE_CASES, Case, Target
from bench.memory import peak_extra_bytes
from bench.op_engines import Problem, WrongResultError, check, draw_matrices, eager, ours
from bench.op_measure import judge, measure
from bench.provenance import ROOT
from bench.timing import Timing, captured, interleaved
from gircse.roofline import Ceilings

CEILINGS = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "microseconds"), [("qwen2.5-0.5b", (91, 91, 176, 706)), ("qwen2.5-7b", (727, 727, 728, 2826))]
)
def test_floors_on_an_h100(model, microseconds):
    """Worked out by hand for 3.0 TB/s and 790 TFLOP/s, of a tied model and an untied one."""
    for rows, expected in zip((1, 64, 256, 1024), microseconds, strict=True):
        assert Case(model, rows).floor(H100) * 1e6 == pytest.approx(expected, rel=0.01)


def test_forward_and_backward_are_ten_tvd():
    vocab, width, _ = MODELS["qwen2.5-0.5b"]
    case = Case("qwen2.5-0.5b", 1024, BOTH)
    assert sum(work.flops for work in case.work()) == 10 * 1024 * vocab * width
    assert case.floor(H100) == pytest.approx(10 * 1024 * vocab * width / 790e12)
    # few rows: both passes read the matrix
    assert Case("qwen2.5-0.5b", 1, BOTH).floor(H100) == pytest.approx(2 * 2 * vocab * width / 3e12)
    assert Case("qwen2.5-0.5b", 1, dtype="float32").floor(H100) == pytest.approx(4 * vocab * width / 3e12)


def test_names_are_unique():
    names = [case.name for case in (*CASES, *SMOKE_CASES)]
    assert len(set(names)) == len(names)
    assert set(names) >= COMPILED
    assert len(COMPILED) == 4


def test_targets():
    target = Target(1.7, over_floor=1.25)
    line = {"over_floor": 1.25, "speedup": 1.7}
    assert target.misses(line) == []
    assert target.judge(line) == {**line, "target": ">= 1.7x, <= 1.25 floor", "misses": [], "met": True}
    assert target.misses({**line, "over_floor": 1.3}) == ["<= 1.25 floor: 1.3"]
    assert target.misses({"over_floor": 2.0, "speedup": 1.0}) == [">= 1.7x: 1", "<= 1.25 floor: 2"]
    assert target.misses({**line, "speedup": None}) == []  # the baseline could not run
    assert Target(extra_bytes=1e9).misses({"extra_bytes": 2_000_000_000}) == ["< 1 GB: 2e+09"]
    assert Target(1.0).misses({"speedup": float("nan")}) != []
    assert Target(milliseconds=8, over_zero=1.25).misses({"milliseconds": 9, "over_zero": 1.3}) == [
        "<= 8 ms: 9",
        "<= 1.25 K=0: 1.3",
    ]
    assert Target().misses({}) == []
    assert Target().judge({})["met"] is None


def _problem(what: str = BOTH, rows: int = 50, model: str = "tiny-untied") -> Problem:
    return Problem.draw(rows, what, *draw_matrices(MODELS[model], torch.float32, CPU))


@pytest.mark.parametrize(("model", "what"), [("tiny-tied", FORWARD), ("tiny-untied", BOTH)])
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
    case = Case("tiny-tied", 37, BOTH, "float32", Target(1e9, over_floor=1e9))
    record = _measure(case)
    mine, theirs = (record["engines"][name]["milliseconds"] for name in ("ours", "eager"))
    assert record["floor_milliseconds"] == pytest.approx(case.floor(CEILINGS) * 1e3)
    assert record["over_floor"] == pytest.approx(mine / record["floor_milliseconds"])
    assert (record["milliseconds"], record["eager_milliseconds"]) == (mine, theirs)
    assert record["speedup"] == record["plain_speedup"] == pytest.approx(theirs / mine)
    assert record["memory_ratio"] == record["extra_bytes"] / record["engines"]["eager"]["peak_extra_bytes"]
    assert record["met"] is False
    assert len(record["misses"]) == 1
    assert record["targets"] == {"speedup": 1e9, "over_floor": 1e9}
    assert record["agreement"]["verdict"] == OK
    assert record["replay"] is None
    (line,) = record["lines"]
    assert (line["case"], line["ours"], line["baseline"], line["met"]) == (case.name, mine, theirs, False)
    assert json.loads(json.dumps(record)) == record


def test_graphs_are_compared_where_both_could_be_captured():
    plain = {name: Timing.of([seconds]) for name, seconds in (("ours", 4.0), ("eager", 6.0))}
    graphs = {name: Timing.of([seconds]) for name, seconds in (("ours", 1.0), ("eager", 2.0))}

    def compared(replayed):
        found = op_measure._comparisons(plain, replayed, {"ours": 3, "eager": 4}, 0.5)
        return found["milliseconds"], found["speedup"], found["plain_speedup"]

    assert compared(graphs) == (1e3, 2.0, 1.5)
    assert compared({"ours": graphs["ours"]}) == (4e3, 1.5, 1.5)  # never a graph against plain calls
    assert compared({}) == (4e3, 1.5, 1.5)
    alone = op_measure._comparisons({"ours": plain["ours"]}, {"ours": graphs["ours"]}, {"ours": 3}, 0.5)
    assert (alone["milliseconds"], alone["speedup"], alone["memory_ratio"]) == (1e3, None, None)


def test_what_cannot_run_is_null(monkeypatch):
    def too_big(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    def no_compiler(*_):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand many more lines")

    monkeypatch.setattr(op_measure, "eager", too_big)
    monkeypatch.setattr(op_measure, "compiled", lambda backend: no_compiler)
    record = _measure(replace(SMOKE_CASES[0], target=Target(2.0, extra_bytes=1e9)))
    assert record["engines"]["eager"] is None
    assert record["engines"]["compiled"] is None
    assert record["failures"]["eager"] == "out of memory"
    assert record["failures"]["compiled"].endswith("no working C++ compiler")
    assert record["speedup"] is record["plain_speedup"] is record["memory_ratio"] is None
    assert record["met"] is True
    assert record["engines"]["ours"]["milliseconds"] > 0


@pytest.mark.parametrize(("name", "error"), [("eager", RuntimeError("shapes")), ("ours", torch.OutOfMemoryError("!"))])
def test_other_failures_are_raised(monkeypatch, name, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(op_measure, name, broken)
    with pytest.raises(type(error)):
        _measure(SMOKE_CASES[0])


def test_memory_that_was_kept_for_later_is_given_back_once(monkeypatch):
    calls = []

    def full_at_first(hidden, head, embed):
        calls.append(len(hidden))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ours(hidden, head, embed)

    given_back = []
    monkeypatch.setattr(op_measure, "ours", full_at_first)
    monkeypatch.setattr(op_measure, "give_back", given_back.append)
    assert _measure(SMOKE_CASES[0])["failures"] == {}
    assert given_back == [CPU]


@pytest.mark.parametrize(("wrong", "verdict"), [(_cold, WRONG), (None, UNCHECKED)])
def test_a_speed_is_shown_whatever_the_check_says(monkeypatch, wrong, verdict):
    def checked(problem):
        if wrong is None:
            raise torch.OutOfMemoryError("no room for float64")
        return check(problem, wrong)

    monkeypatch.setattr(op_measure, "check", checked)
    record = _measure(SMOKE_CASES[0])
    assert record["agreement"]["verdict"] == verdict
    assert record["milliseconds"] > 0


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


def test_a_capture_warms_up_on_a_stream_of_its_own_and_keeps_what_it_writes_to(monkeypatch):
    """With stand-ins: there is no GPU here."""
    log: list[str] = []

    class Stream:
        def __init__(self, device=None):
            self.name = "side" if device is not None else "default"

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def inside(what):
        log.append(f"into {getattr(what, 'name', 'the graph')}")
        yield
        log.append("out")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", inside)
    results = iter(["of the warm-up", "of the capture"])
    replay, kept = captured(lambda: log.append("run") or next(results), torch.device("cuda"))
    first = ["side waits for default", "into side", "run", "out", "default waits for side"]
    assert log == [*first, "into the graph", "run", "out", "replay"]
    assert kept[1] == "of the capture"
    replay()
    assert log[-1] == "replay"


def _no_compiler(*_):
    raise RuntimeError("no C++ compiler")


def test_soft_embed_command_keeps_its_record(monkeypatch, tmp_path, capsys):
    out = tmp_path / "record.json"
    arguments = ["--shape", "tiny-tied", "--rows", "1", "5", "--seconds", "0.02", "--device", "cpu"]
    monkeypatch.setattr(soft_embed, "measure_ceilings", lambda *_: Ceilings(1e11, 1e10))
    monkeypatch.setattr(op_measure, "compiled", lambda _: _no_compiler)
    assert soft_embed.main([*arguments, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    published = json.loads((ROOT / "bench" / "results" / "soft_embed-cpu.json").read_text())
    assert record.keys() >= published.keys() - {"repeats"}
    assert record["points"][0].keys() >= published["points"][0].keys()
    assert all(point["floor_milliseconds"] > 0 for point in record["points"])
    assert record["failures"]["compiled, T = 5, forward"] == "RuntimeError: no C++ compiler"
    assert [(p["rows"], p["pass"]) for p in record["points"]] == [(1, FORWARD), (1, BOTH), (5, FORWARD), (5, BOTH)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record

    monkeypatch.setattr(op_measure, "check", lambda problem: check(problem, _cold))
    with pytest.raises(SystemExit, match="no speed is reported"):
        soft_embed.main([*arguments, "--no-compile"])
