"""The traffic model against the floors that the project promises to approach."""

from __future__ import annotations

import pytest
from gircse_kernels.plan import L2_BYTES, ROW_BLOCK, Device, OnePass, Problem, TwoPass, plan_backward, plan_forward

from bench.static import traffic
from bench.static.launches import DEVICES, Call, allocated_bytes, launches

TIED = {"SmolLM2-135M": (49152, 576), "Qwen2.5-0.5B": (151936, 896), "Qwen3-0.6B": (151936, 1024)}
WIDE_TIED = {"Llama-3.2-1B": (128256, 2048), "Qwen3-4B": (151936, 2560)}
UNTIED = {"Mistral-7B": (32000, 4096), "Qwen2.5-7B": (152064, 3584)}
H100, A100 = DEVICES[90], DEVICES[80]
DEVICES = pytest.mark.parametrize("device", [H100, A100], ids=["sm_90", "sm_80"])
# microseconds of PERFORMANCE on an H100: 3.0 TB/s, 790 TFLOP/s
FLOORS = {
    "SmolLM2-135M": (19, 37, 147),
    "Qwen2.5-0.5B": (91, 176, 706),
    "Qwen3-0.6B": (104, 202, 807),
    "Llama-3.2-1B": (175, 340, 1362),
    "Qwen3-4B": (259, 504, 2017),
    "Mistral-7B": (175, 176, 680),
    "Qwen2.5-7B": (727, 728, 2826),
}


def problem(model: str, rows: int) -> Problem:
    vocab, width = {**TIED, **WIDE_TIED, **UNTIED}[model]
    return Problem(rows, vocab, width, width, model not in UNTIED, 2)


def call_of(model: str, rows: int) -> Call:
    vocab, width = {**TIED, **WIDE_TIED, **UNTIED}[model]
    return Call("soft_embed", (rows, vocab, width, width), "bfloat16", model not in UNTIED)


@pytest.mark.parametrize("model", FLOORS)
def test_floors_are_those_of_the_plan_of_the_project(model: str) -> None:
    for rows, expected in zip((1, 256, 1024), FLOORS[model], strict=True):
        flops, moved = traffic.forward_floor(problem(model, rows))
        assert max(flops / 790e12, moved / 3.0e12) * 1e6 == pytest.approx(expected, rel=0.02)


@DEVICES
@pytest.mark.parametrize("model", TIED)
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_few_rows_of_a_tied_model_read_the_matrix_once(model: str, rows: int, device: Device) -> None:
    found = plan_forward(problem(model, rows), device)
    assert isinstance(found, OnePass)
    assert found.row_blocks <= 2
    work = traffic.forward_work(problem(model, rows), device)
    floor = traffic.forward_floor(problem(model, rows))
    assert sum(w.matrix_bytes + w.row_bytes for w in work) <= 1.05 * floor.bytes
    # partial sums stay in L2, written and read
    assert sum(w.partial_bytes for w in work) <= 2 * 32 << 20
    assert work[0].partial_bytes == work[-1].partial_bytes


@DEVICES
@pytest.mark.parametrize("model", WIDE_TIED)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_few_rows_of_a_wide_tied_model_read_the_matrix_once(model: str, rows: int, device: Device) -> None:
    """In one pass, or in chunks that are still in L2 for their second product."""
    case = problem(model, rows)
    found = plan_forward(case, device)
    if isinstance(found, TwoPass):
        assert found.chunk * case.width * case.itemsize <= L2_BYTES
    floor = traffic.forward_floor(case)
    assert sum(w.matrix_bytes + w.row_bytes for w in traffic.forward_work(case, device)) <= 1.05 * floor.bytes


@DEVICES
@pytest.mark.parametrize("model", UNTIED)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_few_rows_of_an_untied_model_read_both_matrices_once(model: str, rows: int, device: Device) -> None:
    case = problem(model, rows)
    work, floor = traffic.forward_work(case, device), traffic.forward_floor(case)
    assert sum(w.matrix_bytes + w.row_bytes for w in work) <= 1.05 * floor.bytes
    assert sum(w.bytes for w in work) <= 1.2 * floor.bytes


@DEVICES
@pytest.mark.parametrize("model", FLOORS)
@pytest.mark.parametrize("rows", [1024, 4096, 65536])
def test_many_rows_are_bound_by_arithmetic(model: str, rows: int, device: Device) -> None:
    """Little padding; even with all partial traffic at memory speed, arithmetic takes longer."""
    case = problem(model, rows)
    for work, floor in (
        (traffic.forward_work(case, device), traffic.forward_floor(case)),
        (traffic.backward_work(case, device), traffic.backward_floor(case)),
    ):
        assert sum(w.flops for w in work) <= 1.15 * floor.flops
        flops_per_s, bytes_per_s = (790e12, 3.0e12) if device.arch == 90 else (312e12, 1.9e12)
        assert sum(w.bytes for w in work) / bytes_per_s <= 1.0 * floor.flops / flops_per_s


@DEVICES
@pytest.mark.parametrize("model", FLOORS)
@pytest.mark.parametrize("rows", [1, 16, 64, 256, 1024, 4096, 65536])
@pytest.mark.parametrize("backward", ["", "hidden", "all"])
def test_extra_memory(model: str, rows: int, backward: str, device: Device) -> None:
    """Every allocation of a call, counted on meta tensors: the chunk budget of 64 MiB plus O(T D), never T V."""
    variants = ("statistics", *(["matrices"] if backward == "all" else []))
    call = call_of(model, rows)._replace(backward=bool(backward), variants=variants)
    extra, width = allocated_bytes(call, device), call.problem.width
    outputs = 9 * rows * 8 + rows * width * (2 + 4)
    accumulator = 4 * min(rows, ROW_BLOCK) * width
    assert extra.forward <= outputs + accumulator + (64 << 20)
    if backward == "all":  # of the bias there is no gradient
        outputs += call.problem.vocab * width * 2 * (1 if call.tied else 2)
    assert extra.backward <= outputs + accumulator + (64 << 20)


def test_launches_of_the_model_are_those_of_the_launcher() -> None:
    for model, rows, backward in [("Qwen2.5-0.5B", 16, False), ("Qwen2.5-7B", 64, False), ("Qwen2.5-0.5B", 9000, True)]:
        call = call_of(model, rows)._replace(backward=backward)
        launched = [launch.name for launch in launches(call, H100)]
        work = traffic.forward_work(call.problem, H100)
        work += traffic.backward_work(call.problem, H100) if backward else []
        assert {w.kernel: w.launches for w in work} == {name: launched.count(name) for name in launched}


def test_plans_are_made_once() -> None:
    case = problem("Qwen2.5-0.5B", 16)
    assert plan_forward(case, H100) is plan_forward(case, H100)
    assert plan_backward(case, H100, False, False) is plan_backward(case, H100, False, False)
