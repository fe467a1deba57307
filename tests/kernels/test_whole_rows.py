"""Forms 1 and 2 with the tiles of the committed table, in Triton's interpreter: every width and number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels import plan
from gircse_kernels.plan import Config, Device, FewRows, OneRow, Problem, TwoProducts, plan_forward
from gircse_kernels.soft_embed import device_of
from torch import Tensor

from gircse.ops import soft_embed
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.kernels.small_plans import SMALL, small_plans
from tests.ops.accuracy import noise_of, random_inputs, rms

pytestmark = pytest.mark.usefixtures("interpreter")
BIAS = {"bias": True, "row_temperature": True}


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "arguments", "options"),
    [
        (1, 576, torch.bfloat16, {}, {}),
        (1, 896, torch.float16, BIAS, {"softcap": 3.0}),
        (1, 1536, torch.bfloat16, {}, {"gumbel_seed": 5}),
        (1, 2000, torch.bfloat16, BIAS, {"embed_scale": 8.0}),
        (2, 1024, torch.bfloat16, BIAS, {"gumbel_seed": 5}),
        (16, 896, torch.bfloat16, {}, {}),
        (17, 560, torch.float16, BIAS, {}),
        (32, 896, torch.bfloat16, {}, {"temperature": 0.7}),
        (16, 2048, torch.float16, {}, {"softcap": 3.0}),
        (9, 1500, torch.bfloat16, BIAS, {}),
    ],
)
def test_against_float64(
    rows: int, width: int, dtype: torch.dtype, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Several splits and tiles, the last one ragged; the statistics and the result, beside eager PyTorch's error."""
    vocab = 211
    found = plan_forward(Problem(rows, vocab, width, width, True, 2), device_of(torch.device("cpu")))
    assert isinstance(found, OneRow if rows == 1 else FewRows)
    assert found.splits > 1
    assert vocab % found.config.blocks["BLOCK_V"]
    tensors = random_inputs((rows,), vocab, width, scale=3 * width**-0.5, dtype=dtype, **arguments)
    forward_as_accurate_as_eager(tensors, options)


def forward_as_accurate_as_eager(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    dtype = tensors["hidden"].dtype
    out, stats = soft_embed(**tensors, **options, return_stats=True, backend="triton")  # type: ignore[misc]
    noise = noise_of(options["gumbel_seed"], tensors) if "gumbel_seed" in options else None
    others: dict[str, Any] = {name: value for name, value in options.items() if name != "gumbel_seed"}
    eager, _ = soft_embed_reference(**tensors, **others, noise=None if noise is None else noise.to(dtype))
    truth, exact = soft_embed_reference(**{n: t.double() for n, t in tensors.items()}, **others, noise=noise)
    assert rms([out - truth]) <= 2 * rms([eager - truth])
    for name in ("lse", "entropy", "max_prob"):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.argmax, exact.argmax)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_divided_among_the_warps(groups: int, dtype: torch.dtype) -> None:
    config = Config({"BLOCK_T": 16, "BLOCK_V": 16, "PIECE": 64, "GROUPS": groups}, 4, 2)
    with small_plans(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find", lambda kernel, *_: config if kernel == "few_rows" else SMALL[kernel])
        tensors = random_inputs((19,), 107, 90, bias=True, scale=0.3, dtype=dtype)
        for options in ({}, {"gumbel_seed": torch.arange(19), "softcap": 3.0}):
            forward_as_accurate_as_eager(tensors, options)


def test_rows_and_widths_that_are_held_whole() -> None:
    """One row, 2 to 32 rows, more; tied, half precision. Up to D = 2048, beyond 1024 up to 16 rows."""
    device = Device(90, 132)
    problem = Problem(32, 50_000, 1024, 1024, True, 2)
    kinds = {1: OneRow, 2: FewRows, 16: FewRows, 17: FewRows, 32: FewRows}
    for rows, kind in kinds.items():
        assert isinstance(plan_forward(problem._replace(rows=rows), device), kind)
    wide = problem._replace(width=2048, value_width=2048)
    for rows, kind in {1: OneRow, 2: FewRows, 16: FewRows, 17: TwoProducts}.items():
        assert isinstance(plan_forward(wide._replace(rows=rows), device), kind)
    wider = {"rows": 1, "width": 2049, "value_width": 2049}
    for other in ({"rows": 33}, wider, {"tied": False}, {"itemsize": 4}):
        assert not isinstance(plan_forward(problem._replace(**other), device), (OneRow, FewRows))


def test_partial_sums_stay_within_their_budget() -> None:
    for rows in (1, 16, 32):
        for width in (64, 576, 896, 1024, *((1536, 2048) if rows <= plan.FEW_WIDE_ROWS else ())):
            for device in (Device(80, 108), Device(90, 132), Device(100, 148)):
                problem = Problem(rows, 151_936, width, width, True, 2)
                found = plan_forward(problem, device)
                assert isinstance(found, (OneRow, FewRows))
                assert found.scratch(problem) <= plan.PARTIAL_BYTES
                assert found.splits * found.tiles_per_split * found.config.blocks["BLOCK_V"] >= problem.vocab
                assert found.pieces * found.config.blocks["PIECE"] >= width
