"""What the GPU suite compiles beforehand is what the timed calls start; and alternatives of the committed table."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gircse_kernels import info_nce, launching, plan
from gircse_kernels.plan import Device, Problem

from bench.cases import CASES, SMOKE_CASES
from bench.provenance import ROOT
from bench.static.launches import Call, launches, record
from bench.suite import candidates, precompile
from bench.suite.alternatives import check, using
from bench.suite.session import Session
from gircse.ops import info_nce_op, soft_embed, stepwise_info_nce

DEVICE = Device(90, 132)
ENTRY = {"blocks": {"BLOCK_T": 16, "BLOCK_V": 16, "PIECE": 128, "GROUPS": 1}, "num_warps": 8, "num_stages": 1}
MANY_ROWS = {"plan": {"FEW_ROWS": 0}}


def _described(kernel: Any, grid: Any, config: Any, constants: dict[str, Any]) -> tuple:
    constants = {name: value for name, value in constants.items() if name != "PRECISION"}  # the interpreter's own
    return kernel.__name__, tuple(grid), config, constants


def _started(monkeypatch: pytest.MonkeyPatch, call: Call) -> list[tuple]:
    """The starts of the same call with real tensors; nothing is run."""
    found = []

    def note(kernel: Any, grid: Any, arguments: Any, config: Any, **constants: Any) -> None:
        found.append(_described(kernel, grid, config, constants))

    monkeypatch.setattr(launching, "launch", note)
    for name, module in list(sys.modules.items()):
        if name.startswith("gircse_kernels.") and hasattr(module, "device_of"):
            monkeypatch.setattr(module, "device_of", lambda *_: DEVICE)
    dtype = getattr(torch, call.dtype)
    if call.op == "soft_embed":
        rows, vocab, width, value_width = call.sizes
        hidden = torch.randn(rows, width, dtype=dtype, requires_grad=call.backward)
        head = torch.randn(vocab, width, dtype=dtype)
        embed = None if call.tied else torch.randn(vocab, value_width, dtype=dtype)
        inputs, out = [hidden], soft_embed(hidden, head, embed, backend="triton")
    else:
        monkeypatch.setattr(info_nce_op, "_module", lambda *_: info_nce)
        rows, documents, steps, width = call.sizes
        inputs = [torch.randn(n, steps, width, dtype=dtype, requires_grad=True) for n in (rows, documents)]
        out = stepwise_info_nce(*inputs)
    if call.backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))  # type: ignore[arg-type]
    return found


@pytest.mark.skipif(not launching.INTERPRETED, reason="CPU tensors go to the kernels in the interpreter alone")
@pytest.mark.parametrize(
    "call",
    [
        Call("soft_embed", (1, 5003, 96, 96), "bfloat16"),
        Call("soft_embed", (64, 5003, 96, 96), "bfloat16", True, True),
        Call("soft_embed", (300, 5003, 96, 96), "bfloat16", False, True),
        Call("soft_embed", (20, 5003, 96, 96), "float32", True, True),
        Call("info_nce", (24, 48, 3, 40), "float32", backward=True),
        Call("info_nce", (24, 48, 1, 40), "bfloat16", backward=True),
    ],
    ids=str,
)
def test_meta_tensors_launch_what_real_ones_do(monkeypatch, call):
    expected = [_described(one.kernel, one.grid, one.config, one.constants) for one in launches(call, DEVICE)]
    assert expected
    assert _started(monkeypatch, call) == expected


def test_recording_leaves_the_ops_as_they_were():
    before = launching.launch, info_nce_op._module, torch.autocast
    launches(Call("info_nce", (24, 48, 3, 40), "float32", backward=True), DEVICE)
    assert (launching.launch, info_nce_op._module, torch.autocast) == before


def test_every_section_is_compiled_beforehand():
    found = precompile.calls(["ops", "engine", "step", "training", "loss"])
    assert len(set(found)) == len(found)
    assert {precompile.op_call(case) for case in CASES} <= set(found)
    vocab, width = 151_936, 896
    assert Call("soft_embed", (512, vocab, width, width), "bfloat16") in found  # a decode batch
    assert Call("decoder", (64, 4096, 32, 8, 128, 64, 14336), "bfloat16") in found
    assert {Call("decode_attention", (64, n, 128, 128, 32, 8), "bfloat16") for n in (512, 544)} <= set(found)
    assert Call("soft_embed", (8, vocab, width, width), "bfloat16", True, True) in found  # training, the queries
    assert Call("info_nce", (8, 16, 5, width), "bfloat16", backward=True) in found
    assert Call("info_nce", (8, 16, 1, width), "bfloat16", backward=True) in found  # K = 0
    assert Call("info_nce", (4096, 8192, 5, 3584), "float32", backward=True) in found
    assert Call("info_nce", (96, 288, 3, 3584), "float32", backward=True) in found  # the loss is compared on it
    assert precompile.calls(["plan", "tests"]) == []


def test_an_alternative_holds_inside_its_block_alone():
    problem = Problem(16, 50_000, 896, 896, True, 2)
    committed = plan.plan_forward(problem, DEVICE)
    with using({"few_rows": ENTRY}):
        inside = plan.plan_forward(problem, DEVICE)
        assert isinstance(inside, plan.FewRows)
        assert inside.config == plan.Config(ENTRY["blocks"], 8, 1, 1)
    with using(MANY_ROWS):
        assert isinstance(plan.plan_forward(problem, DEVICE), plan.TwoProducts)
    with pytest.raises(ZeroDivisionError), using(MANY_ROWS):
        1 / 0  # noqa: B018
    assert plan.plan_forward(problem, DEVICE) == committed
    assert inside != committed


def _file(folder, *entries):
    path = folder / "candidates.json"
    path.write_text(json.dumps(list(entries)))
    return path


def test_a_file_of_candidates(tmp_path):
    case = CASES[1]
    path = _file(tmp_path, {"case": case.name, "alternatives": {"small": {"few_rows": ENTRY}, "two": MANY_ROWS}})
    (found,) = candidates.read(path)
    assert found.case == case
    assert found.alternatives == {"table": {}, "small": {"few_rows": ENTRY}, "two": MANY_ROWS}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"case": "fast", "alternatives": {}}, r"candidates.json\[0\]: got case 'fast', expected one of qwen"),
        ({"case": CASES[0].name}, r"\[0\]: got .* expected an object with case and alternatives"),
        (
            {"case": CASES[0].name, "alternatives": {"a": {"two_products": ENTRY}}},
            "a: got kernel 'two_products', expected plan",
        ),
        ({"case": CASES[0].name, "alternatives": {"a": {"plan": {"L3_BYTES": 1}}}}, "a: got plan constant 'L3_BYTES'"),
        ({"case": CASES[0].name, "alternatives": {"a": {"few_rows": {"blocks": {}}}}}, "a: got the entry .* BLOCK_T"),
        ({"case": ["x"], "alternatives": {}}, r"\[0\]: got case \['x'\], expected one of qwen"),
        ({"case": CASES[0].name, "alternatives": [1]}, r"\[0\]: got alternatives \[1\], expected an object"),
        ({"case": CASES[0].name, "alternatives": {"table": MANY_ROWS}}, "expected an object of names, none 'table'"),
        ({"case": CASES[0].name, "alternatives": {"a": 4}}, "a: got 4, expected an object"),
        ({"case": CASES[0].name, "alternatives": {"a": {"few_rows": 4}}}, "a: got 4 for few_rows, expected an object"),
        (
            {"case": CASES[0].name, "alternatives": {"a": {"plan": {"ROW_BLOCK": "1"}}}},
            "a: got ROW_BLOCK '1', expected",
        ),
    ],
)
def test_bad_files_of_candidates(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        candidates.read(_file(tmp_path, entry))


def test_the_committed_candidates_launch_something_else():
    """Every alternative of the first run on a new GPU differs from the table's choice, and can be planned."""
    entries = candidates.read(ROOT / "bench" / "suite" / "candidates.json")
    assert len(entries) >= 12
    for entry in entries:
        seen = set()
        for name, alternative in entry.alternatives.items():
            with using(alternative):
                launches, products = record(precompile.op_call(entry.case), DEVICE)
            assert launches, name
            dtypes = [[getattr(argument, "dtype", None) for argument in one.arguments] for one in launches]
            started = [(one.name, one.grid, one.config) for one in launches]
            seen.add(str((started, dtypes, products)))
        assert len(seen) == len(entry.alternatives), entry


def test_the_choice_for_many_rows_is_an_alternative_too():
    problem = Problem(300, 50_000, 896, 896, False, 2)
    chosen = plan.choose(problem, DEVICE)
    with using({"many_rows": {"half_scores": not chosen.half_scores, "chunk_mib": 5}}):
        assert plan.choose(problem, DEVICE) == chosen._replace(half_scores=not chosen.half_scores, chunk_mib=5)
        assert plan.plan_forward(problem, DEVICE).scratch(problem) < 8 << 20
    assert plan.choose(problem, DEVICE) == chosen
    with pytest.raises(ValueError, match="here: got epilogue 1, expected one like False"):
        check("here", {"many_rows": {"epilogue": 1}})
    with pytest.raises(ValueError, match="here: got choice 'prologue', expected one of"):
        check("here", {"many_rows": {"prologue": True}})


def test_bad_json(tmp_path):
    path = tmp_path / "candidates.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="candidates.json: Expecting"):
        candidates.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="got dict, expected a list"):
        candidates.read(path)


def test_candidates_are_timed_and_the_winner_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(candidates, "race", _slow_many_rows)
    session = Session(tmp_path / "out", torch.device("cpu"), 1.0, smoke=True)
    alternatives = {"two": MANY_ROWS, "broken": {"few_rows": ENTRY}}
    candidates.time_file(session, _file(tmp_path, {"case": SMOKE_CASES[0].name, "alternatives": alternatives}))
    printed = capsys.readouterr().out.splitlines()
    assert next(line for line in printed if " table " in line).split()[-2:] == ["1.000", "WINS"]
    assert next(line for line in printed if " two " in line).split()[-1] == "2.000"
    assert next(line for line in printed if " broken " in line).endswith("no registers")
    record = json.loads((tmp_path / "out" / "cpu" / "candidates.json").read_text())
    assert [row["wins"] for row in record["rows"]] == [True, False, False]


def _slow_many_rows(run, alternatives, device, budget):
    assert budget <= 3.0
    return candidates.Race({"table": 1e-3, "two": 2e-3}, {"broken": "no registers"})


def test_a_race_takes_turns_and_survives_what_cannot_run():
    seen = []

    def run():
        seen.append(plan.FEW_ROWS)
        if plan.FEW_ROWS == 7:
            raise RuntimeError("out of resources")

    found = candidates.race(run, {"table": {}, "two": MANY_ROWS, "bad": {"plan": {"FEW_ROWS": 7}}},
                            torch.device("cpu"), 0.0)  # fmt: skip
    assert found.failed == {"bad": "RuntimeError: out of resources"}
    assert found.seconds.keys() == {"table", "two"}
    assert seen[3:] == [plan.FEW_ROWS, 0] * ((len(seen) - 3) // 2)


def test_candidates_without_time_are_named(tmp_path, capsys):
    session = Session(tmp_path / "out", torch.device("cpu"), 1e-9, smoke=True)
    candidates.time_file(session, _file(tmp_path, {"case": SMOKE_CASES[0].name, "alternatives": {"two": MANY_ROWS}}))
    assert session.skipped == [f"candidates of {SMOKE_CASES[0].name}"]


def test_a_candidate_that_computes_something_else_is_named(tmp_path, monkeypatch):
    def many_rows_are_wrong(hidden, head, embed):
        return hidden @ head.T @ head * (1 if plan.FEW_ROWS else 1.01)

    monkeypatch.setattr(candidates, "ours", many_rows_are_wrong)
    session = Session(tmp_path / "out", torch.device("cpu"), 1.0, smoke=True)
    path = _file(tmp_path, {"case": SMOKE_CASES[0].name, "alternatives": {"two": MANY_ROWS, "same": {}}})
    times = {"table": 2e-3, "two": 1e-3, "same": 3e-3}  # what is wrong wins nothing, however fast it is
    monkeypatch.setattr(candidates, "race", lambda *_: candidates.Race(times, {}))
    candidates.time_file(session, path)
    rows = json.loads((tmp_path / "out" / "cpu" / "candidates.json").read_text())["rows"]
    assert [bool(row["why"] and row["why"].startswith("WRONG: values off by")) for row in rows] == [False, True, False]
    assert [row["wins"] for row in rows] == [True, False, False]


def test_unknown_names_are_refused():
    check("here", {"few_rows": ENTRY, **MANY_ROWS})
    with pytest.raises(ValueError, match="here: got kernel 'plans'"):
        check("here", {"plans": {}})
