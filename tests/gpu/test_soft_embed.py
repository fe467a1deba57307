"""The compiled kernels with the configs of the table against float64, relative to eager PyTorch on the same GPU.

A small case for `compute-sanitizer`: pytest tests/gpu -k sanitizer
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gircse.ops import soft_embed, top_tokens
from gircse.ops.soft_embed_reference import soft_embed_reference, top_tokens_reference
from tests.ops.accuracy import OPTIONS, assert_as_accurate_as_eager, random_inputs, run

CUDA = {"backend": "triton"}


def check(options: dict[str, Any] | None = None, *, width: int, seeds: int = 2, **shape: Any) -> None:
    """Few rows are drawn more often, by the same compiled kernels: one draw of one row is luck."""
    seeds = max(seeds, 6 // shape["leading"][0])
    shape = {"vocab": 3011, "scale": 3 / math.sqrt(width), **shape}
    assert_as_accurate_as_eager(options={**(options or {}), **CUDA}, device="cuda", seeds=seeds, width=width, **shape)


# Compiling is nearly all of the time. The two half precisions run the same code but for the type, so bfloat16 has all
# sizes and the others one of each kind; tests of other rows share most kernels, and conftest.py their process.
HALF_AND_FULL = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
TIED = [(torch.bfloat16, width, rows) for width in (100, 576, 896, 2048, 2560) for rows in (1, 31, 64, 300)]
TIED += [(dtype, 896, rows) for dtype in (torch.float16, torch.float32) for rows in (31, 300)]
UNTIED = [(torch.bfloat16, *widths, rows) for widths in ((896, 200), (64, 1000)) for rows in (1, 64, 300)]
UNTIED += [(dtype, 2000, 333, rows) for dtype in (torch.float16, torch.float32) for rows in (20, 300)]


@pytest.mark.parametrize(("dtype", "width", "rows"), TIED, ids=str)
def test_tied(dtype: torch.dtype, width: int, rows: int) -> None:
    check(width=width, leading=(rows,), dtype=dtype, seeds=1)


@pytest.mark.parametrize(("dtype", "width", "embed", "rows"), UNTIED, ids=str)
def test_untied_with_bias(dtype: torch.dtype, width: int, embed: int, rows: int) -> None:
    check(width=width, embed=embed, leading=(rows,), bias=True, dtype=dtype, seeds=1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rows", [19, 150])
@HALF_AND_FULL
def test_options(dtype: torch.dtype, options: dict[str, Any], rows: int) -> None:
    check(options, width=320, leading=(rows,), bias=True, row_temperature="temperature" not in options, dtype=dtype)


@pytest.mark.parametrize("rows", [19, 150])
@pytest.mark.parametrize("embed", [None, 320])
@HALF_AND_FULL
def test_gumbel(dtype: torch.dtype, rows: int, embed: int | None) -> None:
    """The device's generator is the torch backend's, to rounding."""
    seeds = torch.randint(-(2**62), 2**62, (rows,), device="cuda")
    check({"gumbel_seed": seeds, "temperature": 0.7}, width=320, embed=embed, leading=(rows,), dtype=dtype)


@pytest.mark.parametrize("rows", [16, 150])
@HALF_AND_FULL
def test_nearly_one_hot(dtype: torch.dtype, rows: int) -> None:
    check(width=320, scale=2.0, leading=(rows,), dtype=dtype, with_stats=False)


def test_sanitizer() -> None:
    """Small, and every kernel: one pass, two passes, backward with everything."""
    for embed, dtype, rows in ((None, torch.bfloat16, 5), (72, torch.bfloat16, 19), (None, torch.float32, 19)):
        check(width=72, embed=embed, leading=(rows,), vocab=301, bias=True, row_temperature=True, dtype=dtype, seeds=1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([0, 3, 170]),
    vocab=st.integers(2, 700),
    width=st.sampled_from([1, 77]),
    embed=st.sampled_from([None, 75]),
    transposed=st.booleans(),
)
def test_any_shape(rows: int, vocab: int, width: int, embed: int | None, transposed: bool) -> None:
    dtype = torch.bfloat16
    tensors = random_inputs((rows,), vocab, width, embed, True, scale=3 / math.sqrt(width), dtype=dtype)
    tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    if transposed:
        tensors = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in tensors.items()}
    ours = run(soft_embed, tensors, dtype, True, CUDA)
    truth = run(soft_embed_reference, tensors, torch.float64, True, {})
    for name, exact in truth.items():
        if name != "argmax" and exact.numel():
            assert (ours[name].double() - exact).abs().max() <= 0.05 * (exact.abs().max() + 1), name


@pytest.mark.parametrize("rows", [16, 500])
def test_two_runs_are_bitwise_equal(rows: int) -> None:
    tensors = {n: t.cuda() for n, t in random_inputs((rows,), 3011, 320, bias=True, dtype=torch.bfloat16).items()}
    first, second = (run(soft_embed, tensors, torch.bfloat16, True, CUDA) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiled_equals_eager() -> None:
    tensors = {n: t.cuda() for n, t in random_inputs((33,), 3011, 320, bias=True, dtype=torch.bfloat16).items()}
    compiled = torch.compile(soft_embed, fullgraph=True)

    def function(**arguments: Any) -> Any:
        return compiled(**arguments)

    first, second = (run(f, tensors, torch.bfloat16, True, CUDA) for f in (soft_embed, function))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("rows", "tied"), [(16, True), (16, False), (200, True)])
def test_cuda_graph(rows: int, tied: bool) -> None:
    """Captured once, replayed on other values; new seeds are written into the captured tensor."""
    hidden = torch.randn(rows, 320, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(3011, 320, device="cuda", dtype=torch.bfloat16) / 6
    embed = None if tied else torch.randn(3011, 320, device="cuda", dtype=torch.bfloat16)
    seeds = torch.arange(rows, device="cuda")

    def call() -> Tensor:
        return soft_embed(hidden, head, embed, gumbel_seed=seeds)  # type: ignore[return-value]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in (7, 1000):
        hidden.copy_(torch.randn_like(hidden))
        seeds.copy_(torch.arange(rows, device="cuda") + seed)
        graph.replay()
        assert torch.equal(out, call())


def test_cuda_graph_of_a_training_step() -> None:
    hidden = torch.randn(64, 320, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(3011, 320, device="cuda", dtype=torch.bfloat16) / 6).requires_grad_()
    upstream = torch.randn(64, 320, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(soft_embed(hidden, head), (hidden, head), upstream)  # type: ignore[arg-type]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def extra_bytes(call: Any) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_a_training_step() -> None:
    """T = 256, V = 151,936, D = 896: eager holds at least three [T, V] tensors, 3 x 74 MiB and more."""
    hidden = torch.randn(256, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(151_936, 896, device="cuda", dtype=torch.bfloat16) / 10
    upstream = torch.randn_like(hidden)
    extra = extra_bytes(lambda: torch.autograd.grad(soft_embed(hidden, head), hidden, upstream))  # type: ignore[arg-type]
    assert extra <= (64 << 20) + 8 * 256 * 896 * 4


def test_memory_of_a_whole_batch_of_positions() -> None:
    """T = 65,536: less than 1 GB where eager's scores alone would take 20."""
    hidden = torch.randn(65_536, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(151_936, 896, device="cuda", dtype=torch.bfloat16) / 10
    upstream = torch.randn_like(hidden)
    assert extra_bytes(lambda: torch.autograd.grad(soft_embed(hidden, head), hidden, upstream)) < 1e9  # type: ignore[arg-type]
    with torch.no_grad():
        out = soft_embed(hidden, head)
        few = torch.tensor([0, 4095, 4096, 40_000, 65_535], device="cuda")
        torch.testing.assert_close(out[few], soft_embed(hidden[few], head), rtol=2e-2, atol=2e-2)  # type: ignore[index]


@pytest.mark.parametrize("rows", [16, 300])
def test_matrices_beyond_int32(rows: int) -> None:
    """V D > 2^31 elements; the last rows decide the result."""
    vocab, width = 540_000, 4096
    head = torch.zeros(vocab, width, device="cuda", dtype=torch.bfloat16)
    assert head.numel() > 2**31
    head[-3:] = torch.randn(3, width, device="cuda")
    hidden = head[-3:].repeat(rows, 1)[:rows].contiguous()
    out = soft_embed(hidden, head, temperature=8.0)
    expected = torch.softmax(hidden.double() @ head[-3:].double().T / 8, -1) @ head[-3:].double()
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)  # type: ignore[union-attr]


def test_bad_rows_stay_alone() -> None:
    hidden = torch.randn(40, 320, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(3011, 320, device="cuda", dtype=torch.bfloat16) / 6
    for rows in (10, 40):
        clean = soft_embed(hidden[:rows], head)
        spoilt_in = hidden[:rows].clone()
        spoilt_in[4, 7], spoilt_in[6, 1] = torch.nan, torch.inf
        spoilt = soft_embed(spoilt_in, head)
        others = [i for i in range(rows) if i not in (4, 6)]
        assert torch.equal(spoilt[others], clean[others])  # type: ignore[index]
        assert spoilt[[4, 6]].isnan().all()  # type: ignore[index]


def test_float64_and_top_tokens() -> None:
    hidden, head = torch.randn(9, 64, device="cuda", dtype=torch.float64), torch.randn(501, 64, device="cuda").double()
    out, _ = soft_embed_reference(hidden, head)
    torch.testing.assert_close(soft_embed(hidden, head), out)  # the torch backend
    with pytest.raises(RuntimeError, match="backend: 'triton' is not available: got dtype torch.float64"):
        soft_embed(hidden, head, backend="triton")
    ids, probs = top_tokens(hidden.float(), head.float(), 5)
    exact_ids, exact = top_tokens_reference(hidden, head, 5)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-6)
    assert (ids == exact_ids).float().mean() > 0.9
