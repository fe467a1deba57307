"""The compiled steps of a decoder layer against float64, one behind the other in a graph, and with dependent launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels import decoder, plan
from torch import Tensor

from tests.kernels import test_decoder as interpreted

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if torch.is_tensor(x) else x for name, x in arguments.items()}


@DTYPES
@pytest.mark.parametrize("width", [576, 896, 4096, 5120, 8200])
def test_add_rms_norm_and_finish_step(width: int, dtype: torch.dtype) -> None:
    arguments = interpreted.residual(70, width, dtype)
    post = {"delta_weight": torch.rand(width).to(dtype), "offset": 1.0}
    counters = {name: torch.randint(5, (70,)) for name in ("position", "step")}
    for more in ({}, post):
        interpreted.check("add_rms_norm", on_gpu({**arguments, **more}))
        states = torch.zeros(70, 5, width, dtype=dtype)
        interpreted.check("finish_step", on_gpu({**arguments, **more, **counters, "states": states}))


@DTYPES
@pytest.mark.parametrize(
    "heads",
    [*interpreted.HEADS, (14, 2, 64, 32, False, 0.0), (32, 32, 96, 48, False, 0.0), (24, 8, 128, 48, True, 1.0)],
)
def test_rotary_write(heads: tuple[int, int, int, int, bool, float], dtype: torch.dtype) -> None:
    interpreted.check("rotary_write", on_gpu(interpreted.projection(*heads, dtype)))


@DTYPES
@pytest.mark.parametrize("activation", decoder.ACTIVATIONS)
def test_gated(activation: str, dtype: torch.dtype) -> None:
    arguments = {"gate_up": 3 * torch.randn(70, 2 * 4864).to(dtype), "activation": activation}
    interpreted.check("gated", on_gpu(arguments))


def layers(slots: int, steps: int = 3, layer_count: int = 6) -> Tensor:
    """Steps of a small decoder, captured once and replayed; -> its states. Every kernel reads what the one before it
    wrote, and the attention's slices of every layer share their arrivals."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    rows, width, heads, kv_heads, size = 5, 256, 6, 2, 64
    keys, values = draw(2, layer_count, rows, kv_heads, slots, size).unbind()
    w_qkv, w_out = draw(2, layer_count, (heads + 2 * kv_heads) * size, width).unbind()
    w_qkv, w_out = w_qkv / 16, w_out[:, : heads * size] / 20
    w_up, w_down = draw(layer_count, width, 512) / 16, draw(layer_count, 256, width) / 16
    angles = torch.rand(slots, size // 2, generator=generator, device="cuda")
    cos, sin, weight = angles.cos(), angles.sin(), draw(width).abs()
    row, norm = torch.arange(rows, device="cuda"), {"eps": 1e-6, "offset": 0.0}
    start = torch.tensor([0, 5, slots // 2, slots - 8, slots - 4], device="cuda")
    position, step = start.clone(), torch.zeros(rows, dtype=torch.int64, device="cuda")
    states, hidden = torch.zeros(rows, steps, width, device="cuda", dtype=torch.bfloat16), draw(rows, width)
    first, arrivals = hidden.clone(), torch.zeros(rows * heads, dtype=torch.int32, device="cuda")

    def run() -> None:
        x, delta = hidden.clone(), None
        for layer in range(layer_count):
            qkv = decoder.add_rms_norm(x, delta, weight, **norm) @ w_qkv[layer].T
            decoder.rotary_write(qkv, cos, sin, position, row, keys[layer], values[layer])
            query = qkv.view(rows, -1, size)[:, :heads]
            out = decoder.decode_attention(query, keys[layer], values[layer], position, scale=0.125, arrivals=arrivals)
            normed = decoder.add_rms_norm(x, out.flatten(1) @ w_out[layer], weight, **norm)
            delta = decoder.gated(normed @ w_up[layer], "silu") @ w_down[layer]
        decoder.finish_step(x, delta, weight, states, position, step, out=hidden, **norm)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    hidden.copy_(first)
    position.copy_(start)
    step.zero_()
    for _ in range(steps):
        graph.replay()
    assert not arrivals.any()
    assert torch.equal(position, start + steps)
    assert states.isfinite().all()
    return states


@pytest.mark.parametrize("slots", [128, 1500])
def test_captured_layers_are_the_same_every_time(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, with slices that are merged by whichever program comes last, and with and without dependent launch,
    where a kernel that read too early would read old numbers."""
    expected = layers(slots)
    for _ in range(10):
        assert torch.equal(layers(slots), expected)
    if torch.cuda.get_device_capability() >= (9, 0):
        monkeypatch.setattr(plan, "DEPENDENT_LAUNCH", False)
        for _ in range(10):
            assert torch.equal(layers(slots), expected)
