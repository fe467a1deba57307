"""`bench/run.py --sweep`: what is measured and kept, and verdicts that can fail."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from gircse_kernels.plan import Device

from bench import documents, op_engines, report, run, sweep, sweep_jobs
from bench.blocks_scaling import COMMAND
from bench.cases import BOTH, FORWARD, PASSES
from bench.engines import ENGINES, GRAPH
from bench.shapes import SHAPES
from bench.sweep import CURVES, NAMES, TOLERANCES, Curve, curves_of, judge, log_slope, slopes_of
from bench.sweep_jobs import SoftEmbed, soft_embed_held
from gircse.roofline import Ceilings


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs main() on tiny sizes; the ceilings are given, not measured."""
    monkeypatch.setattr(sweep, "measure_ceilings", lambda *_: Ceilings(1e11, 1e10))
    monkeypatch.setitem(SHAPES["smollm2-135m"].settings, "vocab_size", 4096)  # it would take most of the time

    def call(*curves: str) -> int:
        return run.main(["--sweep", *curves, "--quick", "--device", "cpu", "--out", str(tmp_path / "sweep")])

    return call


def _record(folder: Path, name: str) -> dict:
    return json.loads((folder / "sweep" / f"{name}.json").read_text())


def test_a_curve_of_each_kind(measure, tmp_path, capsys):
    assert measure("soft_embed.V", "encode.K", "train.B") == 0
    assert "of 8 slopes as predicted" in capsys.readouterr().out
    assert len(list((tmp_path / "sweep").iterdir())) == 3
    for name, passes in (("soft_embed.V", list(PASSES)), ("encode.K", ["encode"]), ("train.B", ["training step"])):
        record = _record(tmp_path, name)
        assert (record["benchmark"], record["curve"], record["quick"]) == ("scaling", name, True)
        assert record["axis"] == name[-1]
        assert record["agreement"]["checks"] >= len(record["sizes"])
        assert "profiler" in record["memory_counts"]
        assert [one["pass"] for one in record["series"]] == passes
        for one in record["series"]:
            assert [point["size"] for point in one["points"]] == record["sizes"]
            for point in one["points"]:
                assert min(point["seconds"], point["floor_seconds"], point["peak_extra_bytes"]) > 0
                assert len(point["runs"]) == record["repeats"]
                assert (point["eager"] is not None) == (name == "soft_embed.V")
    # bytes are counted: busy machines do not change them, and the predictions are close in themselves
    assert _record(tmp_path, "train.B")["series"][0]["memory"]["ok"]
    for name in ("encode.K", "train.B"):
        low, high = _record(tmp_path, name)["series"][0]["memory"]["over_prediction"]
        assert 0.9 < low <= high < 1.1


def test_wrong_numbers_leave_no_record_and_the_other_curves_are_measured(measure, monkeypatch, capsys, tmp_path):
    wrong = partial(op_engines.check, op=lambda *tensors: 1.001 * op_engines.ours(*tensors))
    monkeypatch.setattr(sweep_jobs, "check", wrong)
    assert measure("soft_embed.T", "soft_embed.V", "encode.B") == 1
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["encode.B.json"]
    assert "PROBLEM: soft_embed.T: WrongResultError: no speed is reported" in capsys.readouterr().out


def test_an_engine_that_disagrees_is_not_timed(measure, monkeypatch, capsys):
    graph = ENGINES[GRAPH].run
    calls = []

    def every_other(run, lm, batch, steps):
        calls.append(steps)
        return embed(run, lm, batch, steps) * (torch.linspace(1, 1.2, 576) if len(calls) % 2 else 1)

    embed = sweep_jobs.embed
    monkeypatch.setattr(sweep_jobs, "embed", every_other)
    monkeypatch.setattr(sweep, "interleaved", lambda *_: pytest.fail("timed"))
    assert measure("encode.B") == 1
    assert "PROBLEM: encode.B: DisagreementError: graph disagrees with" in capsys.readouterr().out
    assert ENGINES[GRAPH].run is graph


def test_a_size_that_does_not_fit_is_left_out():
    curve = Curve("soft_embed.T", (1, 2, 4), {"V": 64, "D": 8})
    job = SoftEmbed(curve.at(4), torch.float32, torch.device("cpu"))
    job.held = lambda what, at: 1 << 60 if at["T"] == 4 else 100
    found = sweep.measure(curve, job, Ceilings(1e11, 1e10), torch.device("cpu"), 1)
    assert [point["size"] for point in found["series"][0]["points"]] == [1, 2]
    assert [one["size"] for one in found["left_out"]] == [4]


def test_slopes():
    sizes = [1, 2, 4, 8, 16]
    assert log_slope(sizes, [3 * size for size in sizes]) == pytest.approx(1)
    assert log_slope(sizes, [7] * 5) == pytest.approx(0)
    assert log_slope(sizes, [size**2 for size in sizes]) == pytest.approx(2)
    assert log_slope([4], [1]) is None
    assert log_slope(sizes, [0, 1, 2, 3, 4]) is None


def _points(power: float, factor: float = 5.0) -> list[dict]:
    return [{"size": size, "floor_seconds": size, "seconds": factor * size**power} for size in (1, 4, 16)]


def test_a_verdict_is_of_the_slope_and_can_fail():
    found = judge("time", _points(1.0))
    assert found["ok"]
    assert found["over_prediction"] == pytest.approx([5, 5])
    assert judge("time", _points(1.0 + 0.9 * TOLERANCES["time"]))["ok"]
    for power in (1.0 + 1.1 * TOLERANCES["time"], 1.0 - 1.1 * TOLERANCES["time"], 0.0, 2.0):
        assert not judge("time", _points(power))["ok"], power
    assert not judge("time", _points(1.0)[:1])["ok"]  # one size has no slope
    assert not judge("time", [])["ok"]


def test_memory_is_predicted_never_to_be_t_times_v():
    for what in PASSES:
        narrow, wide = (
            soft_embed_held({"T": 64, "V": vocab, "D": 576}, what, torch.float32, torch.device("cpu"))
            for vocab in (4096, 131_072)
        )
        assert narrow == wide
    at = {"T": 64, "V": 4096, "D": 576}
    job = SoftEmbed(at, torch.float32, torch.device("cpu"))
    assert [work.flops for work in job.floor(FORWARD, at)] == [4 * 64 * 4096 * 576]
    assert sum(work.flops for work in job.floor(BOTH, at)) == 10 * 64 * 4096 * 576


def test_what_a_gpu_would_hold(monkeypatch):
    """The launchers' plans, counted without one: bounded in V, and far below T V."""
    monkeypatch.setattr("gircse_kernels.launching.device_of", lambda device: Device(90, 132))
    gpu = torch.device("cuda")
    for what in PASSES:
        for rows in (1, 64, 4096):
            narrow, wide = (
                soft_embed_held({"T": rows, "V": vocab, "D": 896}, what, torch.bfloat16, gpu)
                for vocab in (32_768, 262_144)
            )
            assert narrow <= wide <= (64 << 20) + rows * 896 * 4 * 4
    assert wide < 0.2 * 4096 * 262_144 * 2


@pytest.mark.parametrize("device", sorted(CURVES))
def test_curves_are_long_enough(device):
    assert [curve.name for curve in CURVES[device]] == [curve.name for curve in curves_of(device, quick=True)] == NAMES
    for curve in CURVES[device]:
        assert len(curve.sizes) >= 5
        assert list(curve.sizes) == sorted(set(curve.sizes))
        assert curve.sizes[-1] >= 8 * curve.sizes[0]
        assert curve.axis not in curve.held


class Page:
    """A page with the two blocks, and made-up records."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(documents, "sources_hash", lambda *_: "present")
        self.results, self.docs = root / "results", root / "docs"
        self.results.mkdir()
        self.docs.mkdir()
        self.page = self.docs / "page.md"
        self.page.write_text("".join(f"<!-- table:{b} -->\n<!-- end:{b} -->\n" for b in ("scaling-cpu", "scaling-gpu")))

    def put(self, name: str, sources: str = "present", power: float = 1.0, **changes) -> None:
        curve = CURVES["cpu"][NAMES.index(name)]
        points = [
            {"size": s, "seconds": 2.0 * s**power, "spread": 0.1, "floor_seconds": 1.0 * s, "peak_extra_bytes": 3 * s}
            for s in curve.sizes
        ]
        points = [{**point, "predicted_bytes": 2 * point["size"]} for point in points]
        one = {"pass": curve.kind, "points": points, "time": judge("time", points), "memory": judge("memory", points)}
        origin = dict.fromkeys(("torch", "triton", "commit", "threads", "command", "driver"), None)
        origin |= {"device": "A processor", "date": "2026-01-02T03", "sources": sources}
        record = {
            "benchmark": "scaling",
            "curve": name,
            "axis": curve.axis,
            "held": curve.held,
            "shape": "a-shape",
            "dtype": "float32",
            "quick": False,
            "device": "cpu",
            "memory_counts": "tensors",
            "left_out": [],
            "series": [one],
            "provenance": origin,
            **changes,
        }
        (self.results / f"{name}.json").write_text(json.dumps(record))

    def __call__(self) -> str:
        assert report.main(["--results", str(self.results), "--docs", str(self.docs)]) == 0
        return self.page.read_text()


@pytest.fixture
def page(tmp_path, monkeypatch) -> Page:
    return Page(tmp_path, monkeypatch)


def test_without_a_record_the_page_says_what_to_run(page):
    assert page().count(f"not measured yet: `{COMMAND}`") == 1
    assert f"not measured yet: `{COMMAND} --device cuda`" in page()


def test_the_page_shows_verdicts_and_what_is_missing(page):
    page.put("encode.B")
    page.put("encode.N", power=1.3, left_out=[{"size": 99, "why": "needs much"}])
    page.put("train.K", quick=True)
    text = page()
    assert "3 of 4 slopes as predicted" in text
    assert "| encode.B | time | 1 to 32 | 1.00 | 1.00 | 0.15 | ok | 2.00 |" in text
    assert "| encode.N | time | 16 to 256 | 1.00 | 1.30 | 0.15 | NOT OK |" in text
    assert "Left out of encode.N: 99 (needs much)." in text
    absent = ["soft_embed.T", "soft_embed.V", "encode.K", "train.K", "train.N", "train.B"]
    assert f"Not measured yet: {', '.join(absent)}: `{COMMAND} {' '.join(absent)}`" in text
    assert documents.STALE not in text
    assert (page.docs / "figures/scaling-encode-a-processor.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_with_other_sources_is_stale(page):
    page.put("soft_embed.T", sources="older")
    page.put("train.B")
    text = page()
    assert f"| soft_embed.T{documents.STALE} | time" in text
    assert "| train.B | time" in text


def test_an_unsteady_time_is_marked():
    points = [{"size": s, "spread": 0.5} for s in (1, 2)]
    verdict = {"ok": True, "predicted_slope": 1.0, "measured_slope": 1.0, "tolerance": 0.1, "over_prediction": None}
    record = {"curve": "encode.B", "series": [{"pass": "x", "points": points, "time": verdict, "memory": verdict}]}
    assert [row["unsteady"] for row in slopes_of([record])] == [True, False]
