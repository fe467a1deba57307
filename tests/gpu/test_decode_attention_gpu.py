"""The compiled decode attention against float64 and SDPA, and in a CUDA graph while positions move on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels.decoder.attention import TABLE, decode_attention
from torch import Tensor

from tests.kernels.test_decode_attention import check, problem

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if torch.is_tensor(x) else x for name, x in arguments.items()}


def sdpa(query: Tensor, key: Tensor, value: Tensor, position: Tensor, *, scale: float) -> Tensor:
    visible = torch.arange(key.shape[2], device=key.device) <= position[:, None]
    group = query.shape[1] // key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None],
        key.repeat_interleave(group, 1),
        value.repeat_interleave(group, 1),
        attn_mask=visible[:, None, None],
        scale=scale,
    )[:, :, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [*sorted({width for width, _ in TABLE}), 80, 96, 192])
@pytest.mark.parametrize("splits", [None, 3])
def test_every_entry_of_the_table(width: int, splits: int | None, dtype: torch.dtype) -> None:
    positions = [0, 5, 63, 64, 511, 512, 1000, 1299]
    check({**on_gpu(problem(positions, 14, 2, 1300, width, dtype=dtype)), "splits": splits})


# every combination in bfloat16; the same code in the other dtypes once: each combination is a kernel to compile
HEADS = [
    (torch.bfloat16, heads, window, softcap)
    for heads in ((4, 4), (9, 3), (14, 2), (71, 1))
    for window in (None, 100)
    for softcap in (None, 5.0)
]
HEADS += [(torch.bfloat16, (14, 2), window, None) for window in (1, 4096)]
HEADS += [(dtype, (14, 2), 100, 5.0) for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(("dtype", "heads", "window", "softcap"), HEADS, ids=str)
def test_heads_window_and_softcap(
    heads: tuple[int, int], window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    arguments = on_gpu(problem([0, 130, 600, 2047], *heads, 2048, 64, 48, dtype=dtype))
    check({**arguments, "scale": 0.9, "window": window, "softcap": softcap})


@DTYPES
def test_equals_scaled_dot_product_attention(dtype: torch.dtype) -> None:
    """Both round differently, by no more than a few units of the dtype."""
    positions = torch.randint(0, 3000, (64,)).tolist()
    arguments = on_gpu(problem(positions, 28, 4, 3000, 128, dtype=dtype))
    found, expected = decode_attention(**arguments), sdpa(**arguments)
    eps = max(torch.finfo(dtype).eps, 2e-6)
    assert (found.double() - expected.double()).abs().max() <= 4 * eps * expected.abs().max()


def test_two_runs_and_every_batch_are_bitwise_equal() -> None:
    arguments = on_gpu(problem([0, 300, 511, 90, 1100], 14, 2, 1300, 64, dtype=torch.bfloat16))
    expected = decode_attention(**arguments)
    assert torch.equal(decode_attention(**arguments), expected)
    for row in range(5):
        for slots in (512, 513, 1300):
            if arguments["position"][row] < slots:
                one = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in arguments.items()}
                one["key"], one["value"] = one["key"][:, :, :slots], one["value"][:, :, :slots]
                assert torch.equal(decode_attention(**one)[0], expected[row])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("slots", [400, 1200])
def test_captured_in_a_graph(slots: int, window: int | None) -> None:
    """Positions advance on the device between replays, over slots that are written on the way."""
    arguments = on_gpu(problem([0, 37, 255, 390, 395], 14, 2, slots, 64, dtype=torch.bfloat16))
    arguments["window"] = window
    position = arguments["position"]
    start = position.clone()
    rows = torch.arange(len(position), device="cuda")
    fresh = torch.randn(2, len(position), 2, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        for buffer, new in zip((arguments["key"], arguments["value"]), fresh, strict=True):
            buffer[rows, :, position] = new
        out = decode_attention(**arguments)
        position.add_(1)
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    position.copy_(start)
    for _ in range(5):
        fresh.normal_()
        position_before = position.clone()
        graph.replay()
        assert torch.equal(position, position_before + 1)
        expected = check({**arguments, "position": position_before})
        assert torch.equal(out, expected)


def test_offsets_beyond_32_bits() -> None:
    """A buffer of more than 2^31 elements, the last row behind them."""
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB")
    batch, slots = 530, 32_768
    position = torch.zeros(batch, dtype=torch.int64, device="cuda")
    buffer = torch.zeros(batch, 1, slots, 128, device="cuda", dtype=torch.bfloat16)
    buffer[-1, 0, -1] = 3.0
    position[-1] = slots - 1
    query = torch.ones(batch, 2, 128, device="cuda", dtype=torch.bfloat16)
    out = decode_attention(query, buffer, buffer, position, scale=1.0)
    assert not out[:-1].any()
    torch.testing.assert_close(out[-1], torch.full_like(out[-1], 3.0))
