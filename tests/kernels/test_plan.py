"""Which form runs for which problem, and what the look-up in the table of tiles gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gircse_kernels import launching, plan
from gircse_kernels.plan import Device, FewRows, OneRow, Problem, TwoProducts, plan_backward, plan_forward

from bench.static import plans
from bench.static.launches import DEVICES

H100 = DEVICES[90]
WIDTH, ROWS = plan.WHOLE_WIDTH, plan.FEW_ROWS


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize(
    ("rows", "width", "tied", "itemsize", "form"),
    [
        (1, WIDTH, True, 2, OneRow),
        (2, WIDTH, True, 2, FewRows),
        (ROWS, WIDTH, True, 2, FewRows),
        (ROWS + 1, WIDTH, True, 2, TwoProducts),
        (1, WIDTH + 8, True, 2, TwoProducts),
        (ROWS, WIDTH + 8, True, 2, TwoProducts),
        (1, 64, True, 4, TwoProducts),
        (1, 64, False, 2, TwoProducts),
        (1, 1, True, 2, OneRow),
        (ROWS, 1, True, 2, FewRows),
    ],
)
def test_the_borders_between_the_forms(rows: int, width: int, tied: bool, itemsize: int, form: type, arch: int) -> None:
    assert type(plan_forward(Problem(rows, 32_000, width, width, tied, itemsize), DEVICES[arch])) is form


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
def test_gpus_of_little_shared_memory(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel may ask for more than 99 KiB there; `test_compile` has what each of Ampere's asks for."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=84)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = launching.device_of.__wrapped__(torch.device("cuda", 0))
    forms = {
        (rows, width): type(plan_forward(Problem(rows, 151_936, width, width, True, 2), device))
        for rows in (1, 2, ROWS)
        for width in (576, 584, WIDTH)
    }
    assert {form for (rows, _), form in forms.items() if rows == 1} == {OneRow}
    assert {form for (rows, width), form in forms.items() if rows > 1 and width == 576} == {FewRows}
    assert {form for (rows, width), form in forms.items() if rows > 1 and width > 576} == {TwoProducts}
    for kernel in ("one_row", "few_rows", "matmul"):
        for itemsize in (2, 4):
            assert plan.find(kernel, device.arch, itemsize, 16, 512) == plan.find(kernel, 80, itemsize, 16, 512)


def test_the_choice_for_many_problems() -> None:
    """What `python -m bench.static.plans` prints."""
    lines = plans.lines(H100)
    assert len(lines) >= 40
    for line in lines:
        problem, whole = line.problem, line.problem.tied and line.problem.width <= WIDTH and line.dtype == "bf16"
        expected = (OneRow if problem.rows == 1 else FewRows) if whole and problem.rows <= ROWS else TwoProducts
        assert type(line.plan) is expected, line
        if isinstance(line.plan, TwoProducts):
            # one chunk wherever the scratch holds it: every further chunk is four more launches
            fits = problem.rows * problem.vocab * problem.itemsize <= 32 << 20
            assert line.plan.chunk >= problem.vocab or not fits, line
        else:
            programs = line.plan.splits * getattr(line.plan, "row_blocks", 1)
            assert programs >= 0.95 * H100.num_sms, line
        limit = plan.SCRATCH_BYTES + 8 * problem.rows * problem.width + (1 << 20)
        assert line.plan.scratch(problem) <= limit, line


def test_every_vocabulary_row_has_a_split() -> None:
    for rows, vocab in [(1, 1), (1, 4), (1, 4 * 528), (1, 151_937), (16, 31), (32, 49_153)]:
        found = plan_forward(Problem(rows, vocab, 896, 896, True, 2), H100)
        assert not isinstance(found, TwoProducts)
        covered = found.tiles_per_split * found.config.blocks["BLOCK_V"]
        assert (found.splits - 1) * covered < vocab <= found.splits * covered


def test_many_rows_take_equal_blocks() -> None:
    found = plan_backward(Problem(plan.ROW_BLOCK + 1, 32_000, 896, 896, True, 2), H100, False, False)
    assert found.row_block == plan.ROW_BLOCK // 2 + 1


def test_the_lookup_takes_the_nearest_entry_and_the_safe_default() -> None:
    for arch in DEVICES:
        assert all(plan.find("matmul", arch, 4, rows) is not None for rows in (1, 16, 17, 64, 65, 4096, 10**6))
        for kernel in ("weights", "score_grad"):
            assert all(plan.find(kernel, arch, size, rows) is not None for size in (2, 4) for rows in (1, 10**6))
    found = plan.find("matmul", 90, 4, 40)
    assert found is not None
    assert found.blocks["BLOCK_M"] == 64  # the smallest that holds 40 rows
    assert plan.find("matmul", 90, 4, 10**6) == plan.find("matmul", 90, 4, 4096)
    assert plan.find("matmul", 86, 4, 16) == plan.find("matmul", 80, 4, 16)  # the newest architecture known before it
    assert plan.find("matmul", 75, 4, 16) is None
    assert plan.lookup("matmul", 75, 4, 16) == plan.SAFE["matmul"]
    assert isinstance(plan_forward(Problem(1, 1000, 64, 64, True, 2), Device(75, 40)), TwoProducts)


def test_plans_are_made_once() -> None:
    problem = plans.problem_of("qwen2.5-0.5b", 16)
    assert plan_forward(problem, H100) is plan_forward(problem, H100)
    assert plan_backward(problem, H100, False, False) is plan_backward(problem, H100, False, False)
