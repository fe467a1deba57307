"""`bench/scaling.py`: what is kept, what is measured again, and verdicts that can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from gircse_kernels.plan import Device

from bench import documents, op_engines, report, scaling, scaling_encode, scaling_soft_embed
from bench.agreement import Disagreement
from bench.blocks_scaling import COMMAND
from bench.cases import BOTH, FORWARD, PASSES
from bench.provenance import engine_hash, sources_hash
from bench.scaling_curves import CPU, CUDA, QUICK, Curve
from bench.scaling_slopes import TOLERANCES, judge, log_slope
from bench.scaling_soft_embed import Sizes, floor, held_bytes
from bench.scaling_tables import rows_of
from gircse.roofline import Ceilings

NAMES = "soft_embed.V,encode.K,train.B"


class Runner:
    """Runs main() with --quick on three curves, one of each kind, and says which were measured."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.records = folder, folder / "scaling-cpu-quick"
        self.measured: list[str] = []
        monkeypatch.setattr(scaling, "measure_ceilings", lambda *_, **__: Ceilings(1e11, 1e10))
        monkeypatch.setattr(scaling, "MEASURES", {k: self._counted(m) for k, m in scaling.MEASURES.items()})

    def _counted(self, measure):
        def counted(curve, *arguments):
            self.measured.append(curve.name)
            return measure(curve, *arguments)

        return counted

    def __call__(self, curves: str) -> int:
        self.measured.clear()
        return scaling.main(["--quick", "--device", "cpu", "--out", str(self.out), "--curves", curves])

    def record(self, name: str) -> dict:
        return json.loads((self.records / f"{name}.json").read_text())


@pytest.fixture
def runner(tmp_path, monkeypatch) -> Runner:
    return Runner(tmp_path, monkeypatch)


def test_three_curves_and_nothing_twice(runner, capsys):
    assert runner(NAMES) == 0
    assert runner.measured == NAMES.split(",")
    printed = capsys.readouterr().out
    assert "of 8 slopes as predicted" in printed
    for name, passes, axis in (
        ("soft_embed.V", list(PASSES), "V"),
        ("encode.K", ["encode"], "K"),
        ("train.B", ["training step"], "B"),
    ):
        record = runner.record(name)
        assert (record["benchmark"], record["curve"], record["axis"]) == ("scaling", name, axis)
        assert record["quick"] is True
        assert record["provenance"]["sources"] == sources_hash()
        assert record["provenance"]["engine_sources"] == engine_hash()
        assert record["agreement"]["checks"] >= len(record["sizes"])
        assert "profiler" in record["memory_counts"]
        assert [one["pass"] for one in record["series"]] == passes
        for one in record["series"]:
            assert [point["size"] for point in one["points"]] == record["sizes"]
            for point in one["points"]:
                assert min(point["seconds"], point["floor_seconds"], point["peak_extra_bytes"]) > 0
                assert len(point["runs"]) == record["repeats"]
            # records hold six digits
            again = judge("memory", one["points"])
            assert again["ok"] == one["memory"]["ok"]
            assert again["measured_slope"] == pytest.approx(one["memory"]["measured_slope"], abs=1e-4)
    # bytes are counted: busy machines do not change them, and the predictions are close in themselves
    assert runner.record("train.B")["series"][0]["memory"]["ok"]
    for name, least, most in (("encode.K", 0.9, 1.1), ("train.B", 0.9, 1.1)):
        low, high = runner.record(name)["series"][0]["memory"]["over_prediction"]
        assert least < low <= high < most

    assert runner("soft_embed.V,encode.K") == 0
    assert runner.measured == []
    assert "soft_embed.V: is there already" in capsys.readouterr().out
    path = runner.records / "soft_embed.V.json"
    record = runner.record("soft_embed.V")
    for change in (
        {"provenance": {**record["provenance"], "sources": "older"}},
        {"provenance": {**record["provenance"], "engine_sources": "older"}},
        {"sizes": [1, 2]},
        {"repeats": 9},
    ):
        path.write_text(json.dumps({**record, **change}))
        assert runner("soft_embed.V,encode.K") == 0
        assert runner.measured == ["soft_embed.V"], change
    path.write_text("{")
    assert runner("soft_embed.V") == 0
    assert runner.measured == ["soft_embed.V"]


def test_wrong_numbers_leave_no_record_and_the_other_curves_are_measured(runner, monkeypatch, capsys):
    wrong = partial(op_engines.check, op=lambda *tensors: 1.001 * op_engines.ours(*tensors))
    monkeypatch.setattr(scaling_soft_embed, "check", wrong)
    assert runner("soft_embed.T,encode.B") == 1
    assert not (runner.records / "soft_embed.T.json").exists()
    assert runner.record("encode.B")
    assert "PROBLEM: soft_embed.T: no speed is reported" in capsys.readouterr().out


def test_an_engine_that_disagrees_is_not_timed(monkeypatch):
    embed = scaling_encode._embed
    wrong = torch.linspace(1, 1.2, 576)
    calls = []

    def every_other(states, steps):
        calls.append(steps)
        return embed(states, steps) * (wrong if len(calls) % 2 else 1)

    monkeypatch.setattr(scaling_encode, "_embed", every_other)
    monkeypatch.setattr(scaling_encode, "interleaved", lambda *_: pytest.fail("timed"))
    curve = next(curve for curve in QUICK.curves if curve.name == "encode.B")
    with pytest.raises(Disagreement, match="graph disagrees with official-eval on the timed batch"):
        scaling_encode.measure(curve, QUICK, torch.device("cpu"), Ceilings(1e11, 1e10))


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
        at = [held_bytes(Sizes(64, vocab, 576, 576, True, 4), what, torch.float32, torch.device("cpu"))
              for vocab in (4096, 131_072)]  # fmt: skip
        assert at[0] == at[1]
    narrow, wide = (floor(Sizes(64, 4096, 576, 576, True, 4), what) for what in (FORWARD, BOTH))
    assert [work.flops for work in narrow] == [4 * 64 * 4096 * 576]
    assert sum(work.flops for work in wide) == 10 * 64 * 4096 * 576


def test_what_a_gpu_would_hold(monkeypatch):
    """The launchers' plans, counted without one: bounded in V, and far below T V."""
    monkeypatch.setattr(scaling_soft_embed, "device_of", lambda device: Device(90, 132))
    gpu = torch.device("cuda")
    for what in PASSES:
        for rows in (1, 64, 4096):
            narrow, wide = (
                held_bytes(Sizes(rows, vocab, 896, 896, True, 2), what, torch.bfloat16, gpu)
                for vocab in (32_768, 262_144)
            )
            assert narrow <= wide <= (64 << 20) + rows * 896 * 4 * 4
    assert wide < 0.2 * 4096 * 262_144 * 2


@pytest.mark.parametrize("scale", [CPU, CUDA], ids=["cpu", "cuda"])
def test_curves_are_long_enough(scale):
    assert len({curve.name for curve in scale.curves}) == len(scale.curves) == 8
    for curve in scale.curves:
        assert len(curve.sizes) >= 5
        assert list(curve.sizes) == sorted(set(curve.sizes))
        assert curve.sizes[-1] >= 8 * curve.sizes[0]
        assert curve.axis not in curve.held
    assert [curve.name for curve in QUICK.curves] == [curve.name for curve in scale.curves]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--curves", "encode.Q"],
            "--curves: got 'encode.Q', expected some of soft_embed, encode, train, soft_embed.T",
        ),
        (["--device", "mps"], "--device: got 'mps', expected cpu or cuda"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        scaling.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


class Page:
    """A page with the two blocks, and made-up records."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(documents, "sources_hash", lambda *_: "present")
        monkeypatch.setattr(documents, "engine_hash", lambda: "engine")
        self.results, self.docs = root / "results", root / "docs"
        self.results.mkdir()
        self.docs.mkdir()
        self.page = self.docs / "page.md"
        self.page.write_text("".join(f"<!-- table:{b} -->\n<!-- end:{b} -->\n" for b in ("scaling-cpu", "scaling-gpu")))

    def put(
        self, curve: Curve, sources: str = "present", engine: str = "engine", power: float = 1.0, **changes
    ) -> None:
        points = [
            {"size": s, "seconds": 2.0 * s**power, "spread": 0.1, "floor_seconds": 1.0 * s, "peak_extra_bytes": 3 * s}
            for s in curve.sizes
        ]
        points = [{**point, "predicted_bytes": 2 * point["size"]} for point in points]
        one = {"pass": curve.kind, "points": points, "time": judge("time", points), "memory": judge("memory", points)}
        origin = dict.fromkeys(("torch", "triton", "commit", "threads", "command", "driver"), None)
        origin |= {"device": "A processor", "date": "2026-01-02T03", "sources": sources, "engine_sources": engine}
        record = {
            "benchmark": "scaling",
            **scaling._setting(curve, CPU),
            "device": "cpu",
            "memory_counts": "tensors",
            "left_out": [],
            "series": [one],
            "provenance": origin,
            **changes,
        }
        (self.results / f"{curve.name}.json").write_text(json.dumps(record))

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
    curves = {curve.name: curve for curve in CPU.curves}
    page.put(curves["encode.B"])
    page.put(curves["encode.N"], power=1.3, left_out=[{"size": 99, "why": "needs much"}])
    page.put(replace(curves["train.K"], axis="K"), quick=True)
    text = page()
    assert "3 of 4 slopes as predicted" in text
    assert "| encode.B | time | 1 to 32 | 1.00 | 1.00 | 0.15 | ok | 2.00 |" in text
    assert "| encode.N | time | 16 to 256 | 1.00 | 1.30 | 0.15 | NOT OK |" in text
    assert "Left out of encode.N: 99 (needs much)." in text
    assert f"Not measured yet: soft_embed.T, soft_embed.V, encode.K, train.K, train.N, train.B: `{COMMAND}`" in text
    assert documents.STALE not in text
    assert (page.docs / "figures/scaling-encode-a-processor.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_with_another_engine_is_stale(page):
    curves = {curve.name: curve for curve in CPU.curves}
    page.put(curves["encode.B"], engine="older")
    page.put(curves["soft_embed.T"], sources="older")
    page.put(curves["train.B"])
    text = page()
    assert f"| encode.B{documents.STALE} | time" in text
    assert f"| soft_embed.T{documents.STALE} | time" in text
    assert "| train.B | time" in text


def test_an_unsteady_time_is_marked():
    points = [{"size": s, "spread": 0.5} for s in (1, 2)]
    verdict = {"ok": True, "predicted_slope": 1.0, "measured_slope": 1.0, "tolerance": 0.1, "over_prediction": None}
    record = {"curve": "encode.B", "series": [{"pass": "x", "points": points, "time": verdict, "memory": verdict}]}
    assert [row["unsteady"] for row in rows_of([record])] == [True, False]
