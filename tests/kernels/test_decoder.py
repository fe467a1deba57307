"""The steps of a decoder layer in Triton's interpreter against their definitions in plain PyTorch, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gircse_kernels import decoder
from torch import Tensor

from gircse.engine.body import plain

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def copied(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies, as every step writes to its arguments; with `dtype`, of the floats in it."""
    return {
        name: (x.to(dtype) if dtype and x.is_floating_point() else x).clone() if torch.is_tensor(x) else x
        for name, x in arguments.items()
    }


def check(name: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The result and everything that is written: at most twice as far from float64 as plain PyTorch in the same dtype,
    and a rounding. -> what our step made of the arguments."""
    found = []
    for module, dtype in ((decoder, None), (plain, None), (plain, torch.float64)):
        given = copied(arguments, dtype)
        result = getattr(module, name)(**given)
        found.append({**{k: x for k, x in given.items() if torch.is_tensor(x)}, "result": result})
    ours, baseline, exact = found
    for key, expected in exact.items():
        if expected is None or not expected.is_floating_point():
            assert expected is ours[key] or torch.equal(ours[key], expected), key
            continue
        eps = torch.finfo(ours[key].dtype).eps
        allowed = 2 * (baseline[key].double() - expected).abs().max() + eps * expected.abs().max()
        assert (ours[key].double() - expected).abs().max() <= allowed, key
    return ours


def residual(rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, width).to(dtype),
        "delta": torch.randn(rows, width).to(dtype),
        "weight": torch.rand(width).to(dtype),
        "eps": 1e-6,
        "offset": 0.0,
    }


@DTYPES
@pytest.mark.parametrize("width", [32, 200])
def test_add_rms_norm(width: int, dtype: torch.dtype) -> None:
    arguments = residual(3, width, dtype)
    post = (0.1 * torch.randn(width)).to(dtype)
    check("add_rms_norm", arguments)
    check("add_rms_norm", {**arguments, "offset": 1.0, "delta_weight": post, "eps": 1e-2})
    first = check("add_rms_norm", {**arguments, "delta": None, "weight": torch.rand(width)})
    assert torch.equal(first["x"], arguments["x"])


def test_add_rms_norm_in_views() -> None:
    """Rows of wider buffers, and a place for the result; what lies beside them stays."""
    expected = residual(3, 40, torch.float32)
    wide = {name: torch.full((3, 48), torch.nan) for name in ("x", "delta", "out")}
    given = {**expected, **{name: buffer[:, :40] for name, buffer in wide.items()}}
    for name in ("x", "delta"):
        given[name].copy_(expected[name])
    assert decoder.add_rms_norm(**given) is given["out"]
    torch.testing.assert_close(given["out"], decoder.add_rms_norm(**expected), rtol=0, atol=0)
    torch.testing.assert_close(given["x"], expected["x"], rtol=0, atol=0)
    assert all(buffer[:, 40:].isnan().all() for buffer in wide.values())


@DTYPES
@pytest.mark.parametrize("post", [False, True])
def test_finish_step(post: bool, dtype: torch.dtype) -> None:
    arguments = {
        **residual(4, 72, dtype),
        "states": torch.randn(6, 5, 72).to(dtype)[:4],
        "position": torch.tensor([9, 3, 0, 700]),
        "step": torch.tensor([0, 4, 2, 2]),
        "delta_weight": torch.rand(72).to(dtype) if post else None,
    }
    found = check("finish_step", arguments)
    assert torch.equal(found["states"][torch.arange(4), arguments["step"]], found["result"])


# H, H_kv, d, r / 2, norms, offset: blocks with heads of all kinds, several blocks, columns that are not rotated
HEADS = [(3, 1, 16, 8, False, 0.0), (4, 2, 24, 9, True, 1.0), (5, 1, 256, 128, True, 0.0), (4, 4, 96, 36, False, 0.0)]


def projection(
    heads: int, kv_heads: int, width: int, half: int, normed: bool, offset: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Tokens of two rows of a pool with three, the later ones first."""
    row, position = torch.tensor([2, 0, 2, 0, 2]), torch.tensor([6, 4, 0, 1, 2])
    angles = torch.rand(8, half)
    norms = {name: torch.rand(width).to(dtype) if normed else None for name in ("q_norm", "k_norm")}
    return {
        "qkv": torch.randn(len(row), (heads + 2 * kv_heads) * width).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "position": position,
        "row": row,
        "keys": torch.zeros(3, kv_heads, 7, width, dtype=dtype),
        "values": torch.zeros(3, kv_heads, 7, width, dtype=dtype),
        **norms,
        "eps": 1e-5,
        "offset": offset,
    }


@DTYPES
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotary_write(heads: tuple[int, int, int, int, bool, float], dtype: torch.dtype) -> None:
    """Slots that no token has stay zeros in ours as in the definition."""
    arguments = projection(*heads, dtype)
    found = check("rotary_write", arguments)
    count, kv_heads, width = heads[:3]
    new = found["qkv"].view(5, -1, width)
    where = arguments["row"], slice(None), arguments["position"]
    assert torch.equal(found["keys"][where], new[:, count : count + kv_heads])
    assert torch.equal(found["values"][where], arguments["qkv"].view(5, -1, width)[:, count + kv_heads :])


def test_rotary_write_to_strided_buffers() -> None:
    expected = projection(*HEADS[1], torch.float32)
    given = copied(expected)
    for name in ("keys", "values"):
        given[name] = torch.zeros(3, 9, 2, 32)[:, :7, :, :24].transpose(1, 2)
    given["qkv"] = torch.cat([given["qkv"], torch.full((5, 3), torch.nan)], 1)[:, :-3]
    decoder.rotary_write(**expected)
    decoder.rotary_write(**given)
    for name in ("qkv", "keys", "values"):
        assert torch.equal(given[name], expected[name])


@DTYPES
@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_gated(activation: str, dtype: torch.dtype) -> None:
    check("gated", {"gate_up": 3 * torch.randn(3, 2 * 1100).to(dtype), "activation": activation})


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, under the interpreter
def test_gated_at_large_arguments() -> None:
    values = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    for activation in plain.ACTIVATIONS:
        check("gated", {"gate_up": values, "activation": activation})


def test_no_tokens() -> None:
    for name, arguments in (
        ("add_rms_norm", residual(0, 32, torch.float32)),
        ("rotary_write", {k: x[:0] if k in ("qkv", "row", "position") else x for k, x in PROJECTION.items()}),
        ("gated", {"gate_up": torch.zeros(0, 8), "activation": "silu"}),
    ):
        result = getattr(decoder, name)(**arguments)
        assert result is None or not result.numel()


RESIDUAL = residual(2, 32, torch.float32)
STEP = {
    **RESIDUAL,
    "states": torch.zeros(2, 3, 32),
    "position": torch.zeros(2, dtype=torch.int64),
    "step": torch.zeros(2, dtype=torch.int64),
}
PROJECTION = projection(3, 1, 16, 8, False, 0.0, torch.float32)
GATE = {"gate_up": torch.zeros(2, 8), "activation": "silu"}


@pytest.mark.parametrize(
    ("name", "valid", "change", "error", "message"),
    [
        ("add_rms_norm", RESIDUAL, {"x": torch.zeros(2, 32).double()}, TypeError, "x: got torch.float64"),
        ("add_rms_norm", RESIDUAL, {"x": torch.zeros(32, 2).T}, ValueError, "x: got strides .* expected 1 as the last"),
        ("add_rms_norm", RESIDUAL, {"delta": torch.zeros(2, 32).half()}, TypeError, "delta: got torch.float16"),
        ("add_rms_norm", RESIDUAL, {"delta": torch.zeros(3, 32)}, ValueError, r"delta: got shape .*\[2, 32\]"),
        ("add_rms_norm", RESIDUAL, {"weight": torch.zeros(31)}, ValueError, r"weight: got shape \[31\], expected \[32"),
        ("add_rms_norm", RESIDUAL, {"out": torch.zeros(2, 31)}, ValueError, "out: got shape"),
        ("finish_step", STEP, {"step": torch.zeros(1, dtype=torch.int64)}, ValueError, r"step: .*expected \[2\]"),
        ("finish_step", STEP, {"states": torch.zeros(2, 32)}, ValueError, r"states: .*expected \[2, any, 32\]"),
        ("rotary_write", PROJECTION, {"qkv": torch.zeros(5, 81)}, ValueError, "qkv: got 81 columns"),
        ("rotary_write", PROJECTION, {"qkv": torch.zeros(5, 32)}, ValueError, "qkv: got 32 columns"),
        ("rotary_write", PROJECTION, {"cos": torch.zeros(8, 8).half()}, TypeError, "cos: got torch.float16"),
        ("rotary_write", PROJECTION, {"sin": torch.zeros(7, 8)}, ValueError, "sin: got shape"),
        ("rotary_write", PROJECTION, {"values": torch.zeros(3, 1, 8, 16)}, ValueError, "values: got shape"),
        ("rotary_write", PROJECTION, {"row": torch.zeros(5, dtype=torch.int32)}, TypeError, "row: got torch.int32"),
        ("rotary_write", PROJECTION, {"q_norm": torch.zeros(16)}, ValueError, "k_norm: got one norm"),
        ("gated", GATE, {"activation": "relu"}, ValueError, "activation: got 'relu', expected one of silu, gelu"),
        ("gated", GATE, {"gate_up": torch.zeros(2, 7)}, ValueError, "gate_up: got 7 columns, expected an even number"),
    ],
)
def test_errors(name: str, valid: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(decoder, name)(**{**valid, **change})
