"""`bench/report.py`: the docs say what the records say, and what is stale is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import blocks_performance, documents, report
from bench.cases import CASES, H100
from bench.documents import STALE, block
from bench.op_measure import judge
from bench.provenance import ROOT

SOURCES = "the present ones"
DOCUMENT = """# Title

By hand, from `bench/results/soft_embed-cpu.json`.

<!-- table:ops-cpu -->
<!-- end:ops-cpu -->

Between | bars.

<!-- table:ops-gpu -->
whatever stood here
<!-- end:ops-gpu -->

The end.
"""


class Folders:
    def __init__(self, root: Path) -> None:
        self.results, self.docs = root / "results", root / "docs"
        self.docs.mkdir()
        self.page = self.docs / "page.md"
        self.page.write_text(DOCUMENT)
        self.put("soft_embed-cpu", json.loads((ROOT / "bench/results/soft_embed-cpu.json").read_text()))

    def put(self, name: str, record: dict, sources: str = SOURCES) -> None:
        record = {**record, "provenance": {**record["provenance"], "sources": sources}}
        path = self.results / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))

    def __call__(self, *arguments: str) -> int:
        return report.main(["--results", str(self.results), "--docs", str(self.docs), *arguments])

    @property
    def text(self) -> str:
        return self.page.read_text()


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Folders:
    monkeypatch.setattr(documents, "sources_hash", lambda _: SOURCES)
    return Folders(tmp_path)


def _op_record(case, factor: float, **changes) -> dict:
    floor = case.floor(H100) * 1e3

    def engine(times: float) -> dict:
        return {"milliseconds": floor * times, "spread": 0.01, "peak_extra_bytes": 1 << 20}

    origin = {
        "device": "NVIDIA H100",
        "driver": "570",
        "torch": "2.11",
        "triton": "3.6",
        "date": "2026-01-02T03:04",
        "cuda": "13.0",
    }
    record = {
        "benchmark": "op",
        "case": case.name,
        "device": "cuda",
        "engines": {"ours": engine(factor), "eager": engine(3.0), "compiled": engine(2.5)},
        "failures": {},
        "floor_milliseconds": floor,
        "over_floor": factor,
        "milliseconds": floor * factor,
        "eager_milliseconds": floor * 3.0,
        "speedup": 3.0 / factor,
        "plain_speedup": 2.0 / factor,
        "extra_bytes": 1 << 20,
        "memory_ratio": 0.25,
        "replay": {
            "milliseconds": {"ours": floor * factor},
            "why": {"eager": "RuntimeError: no"},
            "host_microseconds": {"ours": 20.0, "eager": 15.0},
        },
        "provenance": {**origin, "commit": "abc", "threads": 8},
    }
    return judge({**record, **changes}, case)


def test_blocks_are_rendered_and_the_rest_is_left(folders):
    assert folders("--check") == 1
    assert folders() == 0
    text = folders.text
    assert text.startswith("# Title\n\nBy hand, from `bench/results/soft_embed-cpu.json`.\n\n<!-- table:ops-cpu -->\n")
    assert text.count("\n\n`soft_embed-cpu.json`: qwen2.5-0.5b") == 1
    assert text.endswith("<!-- end:ops-gpu -->\n\nThe end.\n")
    assert "Between | bars." in text
    point = json.loads((folders.results / "soft_embed-cpu.json").read_text())["points"][2]
    took = point["milliseconds"]
    assert f"| {took['ours']:,.1f} | {took['eager']:,.1f} |" in text
    assert f"| {point['speedup']:.2f}x |" in text
    assert "whatever stood here" not in text
    assert "no record yet: `python bench/gpu_suite.py --out bench/results`" in text
    assert STALE not in text
    assert "![soft_embed and eager PyTorch, 151936 x 896, tied](figures/soft_embed-cpu.png)" in text
    assert (folders.docs / "figures" / "soft_embed-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert folders("--check") == 0


def test_a_second_run_changes_nothing(folders):
    folders()
    before = {path: path.stat().st_mtime_ns for path in folders.docs.rglob("*.*")}
    assert len(before) == 2
    assert folders() == 0
    assert {path: path.stat().st_mtime_ns for path in folders.docs.rglob("*.*")} == before


def test_check_sees_edits(folders, capsys):
    folders()
    good = folders.text
    folders.page.write_text(good.replace("| forward | 16 |", "| forward | 61 |"))
    assert folders("--check") == 1
    assert "page.md: not what the records say" in capsys.readouterr().out
    assert "| forward | 61 |" in folders.text  # it only looks

    folders.page.write_text(good.replace("By hand", "By another hand"))
    assert folders("--check") == 0

    figure = folders.docs / "figures" / "soft_embed-cpu.png"
    drawn = figure.read_bytes()
    figure.unlink()
    assert folders("--check") == 1
    figure.write_bytes(drawn)
    assert folders("--check") == 0


def test_check_sees_a_new_record(folders, capsys):
    folders()
    record = json.loads((folders.results / "soft_embed-cpu.json").read_text())
    record["points"][0]["milliseconds"]["ours"] = 12.34
    folders.put("soft_embed-cpu", record)
    assert folders("--check") == 1
    printed = capsys.readouterr().out
    assert "page.md" in printed
    assert "soft_embed-cpu.png" in printed
    assert folders() == 0
    assert "12.3" in folders.text
    assert folders("--check") == 0


def test_stale_records_are_marked_and_no_reason_to_fail(folders, monkeypatch):
    folders()
    monkeypatch.setattr(documents, "sources_hash", lambda _: "newer ones")
    assert folders("--check") == 0
    assert folders() == 0
    assert f"`soft_embed-cpu.json`{STALE}: qwen2.5-0.5b" in folders.text
    assert f"By hand, from `bench/results/soft_embed-cpu.json`{STALE}.\n" in folders.text
    assert folders("--check") == 0
    monkeypatch.setattr(documents, "sources_hash", lambda _: SOURCES)
    assert folders("--check") == 0
    assert folders() == 0
    assert STALE not in folders.text


def test_records_of_a_gpu(folders):
    good, bad, big = CASES[0], CASES[1], next(case for case in CASES if case.rows == 65536)
    folders.put(f"nvidia-h100/{bad.name}", _op_record(bad, 1.6), sources="older")
    folders.put(f"nvidia-h100/{good.name}", _op_record(good, 1.1))
    nothing = {"speedup": None, "plain_speedup": None, "eager_milliseconds": None, "memory_ratio": None}
    without = _op_record(big, 1.2, failures={"eager": "out of memory"}, replay=None, **nothing)
    without["engines"]["eager"] = None
    folders.put(f"nvidia-h100/{big.name}", without)
    tests = {"benchmark": "tests", "summary": "=== 12 passed in 3 s ===", "provenance": without["provenance"]}
    folders.put("nvidia-h100/tests", tests)
    smoke = {**_op_record(good, 987.65), "device": "cpu"}
    smoke["provenance"] |= {"cuda": None}
    folders.put("cpu/dry-run", smoke)
    assert folders() == 0
    lines = folders.text.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| qwen2.5-0.5b-T") and "floor" in line]
    assert [row[0] for row in rows] == [f"| {good.name}", f"| {bad.name}{STALE}"]  # in the order of the list
    assert rows[0][3] == "1.10"
    assert rows[0][-1] == "yes |"
    assert rows[1][-1] == "NO: >= 2x: 1.88; <= 1.4 floor: 1.6 |"
    assert any(line.startswith(f"| {big.name} ") and "out of memory" in line for line in lines)
    assert any("**NVIDIA H100**: driver 570, torch 2.11" in line and "2 of 3 targets met" in line for line in lines)
    assert any(line == "Before that, `tests/gpu`: 12 passed in 3 s" for line in lines)
    assert any(line.startswith("No record yet of: ") and CASES[2].name in line for line in lines)
    assert (folders.docs / "figures" / "soft_embed-nvidia-h100.png").is_file()
    assert "987.65" not in folders.text
    assert folders("--check") == 0
    everything = blocks_performance.suite_gpu(documents.Results(folders.results))
    assert f"| {bad.name}{STALE} |" in everything
    assert everything.count("\n| ") == 3 + 1  # and the header


def test_a_block_from_elsewhere(folders, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCKS", dict(documents._BLOCKS))

    @block("elsewhere")
    def kernels(results):
        record = results.records.get("kernels-compile")
        return "none" if record is None else f"{record['registers']} registers{results.mark(record)}"

    with pytest.raises(ValueError, match="'elsewhere' is registered twice"):
        block("elsewhere")(kernels)
    page = folders.docs / "deeper" / "kernels.md"
    page.parent.mkdir()
    page.write_text("<!-- table:elsewhere -->\n<!-- end:elsewhere -->\n")
    folders()
    assert page.read_text() == "<!-- table:elsewhere -->\n\nnone\n\n<!-- end:elsewhere -->\n"
    (folders.results / "kernels-compile.json").write_text('{"registers": 128}')  # sources unknown
    (folders.results / "a-list.json").write_text("[]")
    folders()
    assert f"\n128 registers{STALE}\n" in page.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n\n<!-- table:magic -->\n<!-- end:magic -->\n", "page.md:3: got block 'magic', expected one of "),
        ("<!-- table:ops-cpu -->\n", "page.md:1: <!-- table:ops-cpu --> has no end"),
        ("<!-- table:ops-cpu -->\n<!-- end:ops-gpu -->\n", "page.md:1: <!-- table:ops-cpu --> has no end"),
        (
            "<!-- table:ops-cpu -->\n<!-- table:ops-gpu -->\n<!-- end:ops-gpu -->\n<!-- end:ops-cpu -->\n",
            "page.md:2: <!-- table:ops-gpu --> has no end, or stands inside another block",
        ),
    ],
)
def test_bad_documents(folders, capsys, text, message):
    folders.page.write_text(text)
    with pytest.raises(SystemExit) as exit:
        folders()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message.split(" ops-cpu")[0] in error
    assert folders.text == text


def test_bad_folders(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        report.main(["--results", str(tmp_path / "none")])
    assert exit.value.code == 2
    assert "--results:" in capsys.readouterr().err


def test_without_matplotlib(folders, monkeypatch, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert folders() == 0
    assert "matplotlib is not installed: soft_embed-cpu.png" in capsys.readouterr().out
    assert "| forward | 16 |" in folders.text


def test_the_docs_of_this_repository_are_rendered(tmp_path):
    """Whoever adds a record or edits a table by hand is told to run bench/report.py."""
    assert report.main(["--check"]) == 0
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    page = docs / "performance.md"
    page.write_text(page.read_text().replace("| forward | 16 |", "| forward | 17 |"))
    assert report.main(["--check", "--docs", str(docs)]) == 1


def test_a_wrong_result_meets_no_target(folders):
    for number, factor in enumerate((1.0, 1.0)):
        record = _op_record(CASES[number], factor)
        wrong = {"agreement": {"verdict": "WRONG", "why": "off"}} if number else {}
        folders.put(f"gpu/{CASES[number].name}", {**record, **wrong})
    assert folders() == 0
    assert " 1 of 2 targets met" in folders.text
    assert "WRONG" in folders.text


def test_a_run_in_which_every_engine_failed_is_named(folders):
    folders.page.write_text("<!-- table:throughput-cpu -->\n<!-- end:throughput-cpu -->\n")
    record = json.loads((ROOT / "bench/results/throughput-cpu.json").read_text())
    failed = [{"engine": "graph", "num_steps": 0, "failed": "out of memory"}]
    folders.put("throughput-cpu", {**record, "points": [], "failures": failed})
    assert folders() == 0
    assert "FAILED: graph from K = 0 on: out of memory" in folders.text
