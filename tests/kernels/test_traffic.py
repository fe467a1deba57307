"""The traffic model against the floors and against what the launchers start; the memory of a call, counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gircse_kernels.plan import ROW_BLOCK, SCRATCH_BYTES, Device, Problem, TwoProducts

from bench.shapes import SHAPES, meta_model
from bench.static import plans, traffic
from bench.static.launches import DEVICES, Call, allocated_bytes, record
from gircse.roofline import ModelFacts

NARROW, WIDE = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b"), ("qwen3-4b",)  # tied
UNTIED = ("mistral-7b", "qwen2.5-7b")
ON_ALL = pytest.mark.parametrize("device", DEVICES.values(), ids=[f"sm_{arch}" for arch in DEVICES])
# Microseconds on an H100: 3.0 TB/s, 790 TFLOP/s; T = 1, 256, 1024.
FLOORS = {
    "smollm2-135m": (19, 37, 147),
    "qwen2.5-0.5b": (91, 176, 706),
    "qwen3-0.6b": (104, 202, 807),
    "llama-3.2-1b": (175, 340, 1362),
    "qwen3-4b": (259, 504, 2017),
    "mistral-7b": (175, 176, 680),
    "qwen2.5-7b": (727, 728, 2826),
}


def call_of(
    model: str, rows: int, *, backward: bool = False, variants: tuple[str, ...] = (), given: bool = False
) -> Call:
    problem = plans.problem_of(model, rows)
    if given:
        problem = problem._replace(width=0, tied=False)
    return Call("soft_embed", problem[:4], "bfloat16", problem.tied, backward, variants)


@pytest.mark.parametrize("model", FLOORS)
def test_floors(model: str) -> None:
    for rows, expected in zip((1, 256, 1024), FLOORS[model], strict=True):
        flops, moved = traffic.forward_floor(plans.problem_of(model, rows))
        assert max(flops / 790e12, moved / 3.0e12) * 1e6 == pytest.approx(expected, rel=0.02)


@ON_ALL
def test_few_rows_are_bound_by_matrices_that_are_read_once(device: Device) -> None:
    """Once for each use where a program does not hold whole rows. Partial sums are written and read in L2."""
    for model in FLOORS:
        for rows in (1, 16, 32, 64):
            line = plans.line(model, rows, "bf16", device)
            whole = not isinstance(line.plan, TwoProducts)
            assert whole == (model in NARROW and rows <= (32 if line.problem.width <= 1024 else 16))
            reads = 2 if model in NARROW + WIDE and not whole else 1
            assert sum(w.matrix_bytes + w.row_bytes for w in line.work) <= (reads + 0.05) * line.floor.bytes
            if whole:
                assert sum(w.partial_bytes for w in line.work) <= 2 * 32 << 20
                assert line.work[0].partial_bytes == line.work[-1].partial_bytes
                assert line.launches == 2
            assert line.launches <= 5


@ON_ALL
@pytest.mark.parametrize("model", FLOORS)
def test_many_rows_are_bound_by_arithmetic(model: str, device: Device) -> None:
    """No padding. All traffic at the speed of memory takes no longer than the arithmetic, but for the narrowest model,
    whose scores and probabilities of a chunk would have to stay in L2, and for the gradients of narrow ones, whose dP
    is float32."""
    flops_per_s, bytes_per_s = (312e12, 1.9e12) if device.arch == 80 else (790e12, 3.0e12)
    for rows in (1024, 4096, 65536):
        problem = plans.problem_of(model, rows)
        for work, floor, narrow in (
            (traffic.forward_work(problem, device), traffic.forward_floor(problem), (1.25, 1.0)),
            (traffic.backward_work(problem, device), traffic.backward_floor(problem), (1.6, 1.2)),
        ):
            assert sum(w.flops for w in work) <= 1.05 * floor.flops
            arithmetic = floor.flops / flops_per_s
            share = narrow[0] if problem.width < 896 else narrow[1] if problem.width <= 1024 else 1.0
            assert sum(w.bytes for w in work) / bytes_per_s <= share * arithmetic


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "llama-3.2-1b", "qwen3-4b", "mistral-7b", "qwen2.5-7b"])
@pytest.mark.parametrize("rows", [1, 32, 64, 1024, 5000])
@pytest.mark.parametrize("matrices", [False, True], ids=["frozen", "trained"])
def test_extra_memory(model: str, rows: int, matrices: bool) -> None:
    """Every allocation of a call: the scratch of 64 MiB, P where that fits the same again, and O(T D); never T V."""
    variants = ("statistics", *(["matrices"] if matrices else []))
    call = call_of(model, rows, backward=True, variants=variants)
    extra, width = allocated_bytes(call, DEVICES[90]), call.problem.width
    of_rows = 16 * 8 * rows + rows * width * (2 + 4)  # statistics; results or gradients
    accumulator = 4 * min(rows, ROW_BLOCK) * width
    kept = SCRATCH_BYTES if rows * call.problem.vocab * 2 <= SCRATCH_BYTES else 0
    assert extra.forward <= of_rows + accumulator + SCRATCH_BYTES + kept
    if matrices:  # their gradients; of the bias there is none
        of_rows += call.problem.vocab * width * 2 * (1 if call.tied else 2)
    assert extra.backward <= of_rows + accumulator + SCRATCH_BYTES


@pytest.mark.parametrize("rows", [64, 1024])
def test_given_logits_take_a_third_of_what_eager_takes(rows: int) -> None:
    """Beyond the gradient of the logits. Eager makes logits / T and P, and backward of P those of P and of logits / T.

    Logits are read once by each pass, their gradient is written once, and so is the embedding matrix read."""
    call = call_of("qwen2.5-0.5b", rows, backward=True, given=True)
    logits, matrix = rows * call.problem.vocab * 2, call.problem.vocab * call.problem.value_width * 2
    extra = allocated_bytes(call, DEVICES[90])
    assert extra.forward <= 2 * logits / 3
    assert extra.backward - logits <= 2 * logits / 3
    passes = traffic.forward_work(call.problem, DEVICES[90]), traffic.backward_work(call.problem, DEVICES[90])
    assert [sum(w.matrix_bytes for w in work) for work in passes] == [matrix, matrix]
    elementwise = [next(w for w in work if w.kernel in ("weights_kernel", "score_grad_kernel")) for work in passes]
    assert [w.partial_bytes - 12 * rows * 75 * (i == 0) for i, w in enumerate(elementwise)] == [2 * logits, 4 * logits]
    chunks = {64: (2, 4), 1024: (10, 13)}[rows]
    assert [w.launches for w in elementwise] == list(chunks)
    assert [sum(w.launches for w in work) for work in passes] == [3 * chunks[0] + 1, 2 * chunks[1] + 1]


def test_a_whole_sequence_takes_less_than_a_gigabyte() -> None:
    extra = allocated_bytes(call_of("qwen3-0.6b", 65_536, backward=True), DEVICES[90])
    assert extra.forward + extra.backward < 1e9


@pytest.mark.parametrize(
    ("model", "rows", "backward", "given"),
    [
        ("qwen2.5-0.5b", 1, False, False), ("qwen2.5-0.5b", 32, False, False), ("qwen2.5-7b", 64, False, False),
        ("qwen2.5-0.5b", 1024, True, False), ("mistral-7b", 1024, True, False), ("mistral-7b", 9000, True, False),
        ("qwen2.5-0.5b", 64, True, True), ("qwen2.5-0.5b", 1024, True, True), ("mistral-7b", 9000, True, True),
    ],
)  # fmt: skip
def test_the_model_counts_what_is_launched(model: str, rows: int, backward: bool, given: bool) -> None:
    """P is kept for Mistral's 1,024 rows, whose 63 MiB fit the budget, and for no other case here."""
    call, device = call_of(model, rows, backward=backward, given=given), DEVICES[90]
    kept = backward and not given and rows * call.problem.vocab * 2 <= SCRATCH_BYTES
    work = traffic.forward_work(call.problem, device, kept=SCRATCH_BYTES if kept else 0)
    work += traffic.backward_work(call.problem, device, kept=kept) if backward else []
    expected: Counter[str] = Counter()
    flops = 0
    for one in work:
        expected[one.kernel] += one.launches
        flops += one.flops if one.kernel == traffic.PRODUCT else 0
    launches, products = record(call, device)
    started = Counter(launch.name for launch in launches)
    started.update([traffic.PRODUCT] * len(products))
    assert started == +expected
    assert sum(2 * p.rows * p.columns * p.depth for p in products) == flops


@pytest.mark.parametrize(("model", "rows"), [("qwen2.5-0.5b", 1), ("qwen2.5-0.5b", 64), ("qwen2.5-7b", 300)])
def test_lists_read_the_head_once_and_a_few_rows(model: str, rows: int) -> None:
    """top_k = 30: three launches behind one product for each block of rows whose scores fit the scratch."""
    problem, device = plans.problem_of(model, rows), DEVICES[90]
    work, floor = traffic.lists_work(problem, device, 30, 32), traffic.lists_floor(problem, 30)
    blocks = work[0].launches
    assert blocks == -(-rows * problem.vocab * 4 // SCRATCH_BYTES)
    assert sum(w.matrix_bytes + w.row_bytes for w in work) <= 1.02 * blocks * floor.bytes
    launches, products = record(call_of(model, rows, variants=("top_k",)), device)
    assert Counter(launch.name for launch in launches) == {w.kernel: w.launches for w in work[1:]}
    assert len(products) == blocks
    extra = allocated_bytes(call_of(model, rows, variants=("top_k",)), device).forward
    assert extra <= SCRATCH_BYTES * 1.1 + rows * (problem.width * 4 + 16 * 32 + 200)


@pytest.mark.parametrize(("rows", "dtype"), [(1, "bfloat16"), (32, "bfloat16"), (300, "bfloat16"), (5000, "float32")])
def test_scratch_is_what_the_launcher_allocates(rows: int, dtype: str) -> None:
    itemsize = getattr(torch, dtype).itemsize
    problem = Problem(rows, 49_152, 576, 576, True, itemsize)
    plan = traffic.forward_plan(problem, DEVICES[90])
    found = allocated_bytes(Call("soft_embed", problem[:4], dtype), DEVICES[90]).forward
    results = rows * 576 * itemsize + 5 * 4 * rows
    assert plan.scratch(problem) <= found <= plan.scratch(problem) + results


@pytest.mark.parametrize("cached", [40, 2000])
def test_a_decode_step_is_nine_launches_a_layer(cached: int) -> None:
    """The launches of each kernel are those of the decoder's ops on meta tensors; what lies between the products stays
    a small part of the bytes, and most of that in L2."""
    facts = ModelFacts.of(meta_model(SHAPES["qwen2.5-0.5b"].config(2), torch.bfloat16))
    work = traffic.step_work(facts, 4864, 8, cached)
    assert sum(w.launches for w in work) == 9 * facts.layers + 1
    sizes = (facts.hidden, facts.heads, facts.kv_heads, facts.head_dim, facts.head_dim // 2, 4864)
    calls = [
        Call("decoder", (8, *sizes), "bfloat16"),
        Call("decode_attention", (8, cached, facts.head_dim, facts.head_dim, facts.heads, facts.kv_heads), "bfloat16"),
    ]
    layer = Counter(launch.name for call in calls for launch in record(call, DEVICES[90]).launches)
    layer["add_rms_norm_kernel"] -= 1  # the last one, which ends the step
    assert {w.kernel: w.launches // facts.layers for w in work if w.kernel != traffic.PRODUCT} == layer
    floor = facts.body([cached - 1] * 8, 1).bytes
    assert floor == sum(w.matrix_bytes for w in work)
    assert sum(w.bytes for w in work) <= 1.1 * floor
