"""The decode attention in Triton's interpreter against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from gircse_kernels.decoder.attention import decode_attention
from gircse_kernels.plan import Device
from torch import Tensor

from bench.static.launches import Call, launches

interpreted = pytest.mark.usefixtures("interpreter")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
HALVES = (torch.bfloat16, torch.float16)
STALE = 1e4


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """The definition, in the precision of its inputs; in float64 it is the truth."""
    scores = plain_scores(query, key, position, scale=scale, window=window, softcap=softcap)
    values = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return torch.einsum("bhs,bhse->bhe", scores.softmax(-1), values)


def plain_scores(
    query: Tensor,
    key: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("bhd,bhsd->bhs", query, key.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = position[:, None] - torch.arange(key.shape[2], device=key.device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return scores.masked_fill(hidden[:, None], -torch.inf)


def problem(
    positions: list[int],
    heads: int,
    kv_heads: int,
    slots: int,
    width: int,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Slots behind the position are full of large numbers."""
    batch = len(positions)
    position = torch.tensor(positions)
    key = torch.randn(batch, kv_heads, slots, width)
    value = torch.randn(batch, kv_heads, slots, value_width or width)
    stale = (torch.arange(slots) > position[:, None])[:, None, :, None]
    return {
        "query": torch.randn(batch, heads, width).to(dtype),
        "key": key.masked_fill(stale, STALE).to(dtype),
        "value": value.masked_fill(stale, -STALE).to(dtype),
        "position": position,
        "scale": width**-0.5,
    }


def check(arguments: dict[str, Any]) -> Tensor:
    """At most twice as far from float64 as plain PyTorch in the same dtype, and a rounding of result and scores.

    A float32 rounding of a score is a relative error of its weight: where scores are large and few slots decide, it is
    all the error there is, and plain PyTorch's is then as often much smaller as much larger.
    """
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}
    exact = plain(**wide)
    dtype = arguments["query"].dtype
    ours = decode_attention(**arguments)
    assert ours.dtype == dtype
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    baseline = (plain(**arguments).double() - exact).abs().max()
    names = ("query", "key", "position", "scale", "window", "softcap")
    scores = plain_scores(**{name: wide[name] for name in names if name in wide})
    largest = scores[scores.isfinite()].abs().max()
    floor = (2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest) * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * baseline + floor
    return ours


@interpreted
@pytest.mark.parametrize(
    ("dtype", "group", "splits"),
    [
        *((torch.float32, group, splits) for group in (1, 3, 7, 20) for splits in (1, 3)),
        *((dtype, group, splits) for dtype in HALVES for group, splits in ((3, 1), (20, 3))),
    ],
    ids=str,
)
def test_grouped_queries(group: int, splits: int, dtype: torch.dtype) -> None:
    check({**problem([0, 40, 149], 2 * group, 2, 150, 64, dtype=dtype), "splits": splits})


WIDTHS = [(64, 64), (80, 80), (128, 128), (256, 256), (16, 40), (192, 128)]


# both half precisions read the same entries of the table; float16 meets a whole block and two different widths
@interpreted
@pytest.mark.parametrize(
    ("width", "value_width", "dtype"),
    [
        *((*widths, dtype) for widths in WIDTHS for dtype in (torch.float32, torch.bfloat16)),
        *((*widths, torch.float16) for widths in (WIDTHS[0], WIDTHS[-1])),
    ],
    ids=str,
)
def test_widths(width: int, value_width: int, dtype: torch.dtype) -> None:
    check({**problem([5, 170], 4, 2, 200, width, value_width, dtype), "splits": 2})


# every window in every number of slices; the cap is of single scores, and the half precisions differ by their casts
FEW = ((None, None, 4), (5.0, 50, 1), (5.0, 300, None))
OPTIONS = [
    *itertools.product([torch.float32], [None], [None, 1, 50, 300, 10_000], [None, 1, 4]),
    *((torch.float32, 5.0, window, splits) for _, window, splits in FEW),
    *((dtype, *options) for dtype in HALVES for options in FEW),
]


@interpreted
@pytest.mark.parametrize(("dtype", "softcap", "window", "splits"), OPTIONS, ids=str)
def test_window_and_softcap(window: int | None, softcap: float | None, splits: int | None, dtype: torch.dtype) -> None:
    arguments = problem([0, 1, 127, 128, 411, 570], 4, 2, 571, 32, dtype=dtype)
    arguments["scale"] = 0.9  # scores beyond the cap
    check({**arguments, "window": window, "softcap": softcap, "splits": splits})


@interpreted
@pytest.mark.parametrize("window", [None, 100])
def test_splits_agree(window: int | None) -> None:
    arguments = {**problem([0, 99, 300], 6, 2, 301, 64), "window": window}
    one = decode_attention(**arguments, splits=1)
    for splits in (2, 301):
        torch.testing.assert_close(decode_attention(**arguments, splits=splits), one, rtol=1e-5, atol=1e-6)


@interpreted
@DTYPES
def test_stale_slots_do_not_matter(dtype: torch.dtype) -> None:
    """Bitwise: they are not even read, so not a number is as good."""
    arguments = {**problem([0, 63, 64, 200], 4, 2, 300, 64, dtype=dtype), "splits": 2}
    expected = decode_attention(**arguments)
    behind = (torch.arange(300) > arguments["position"][:, None])[:, None, :, None]
    for name in ("key", "value"):
        arguments[name] = arguments[name].masked_fill(behind, torch.nan)
    assert torch.equal(decode_attention(**arguments), expected)


@interpreted
@pytest.mark.parametrize(("heads", "window"), [((4, 2), None), ((4, 2), 60), ((20, 1), None)], ids=str)
def test_arrivals_are_counted_from_0_to_0(heads: tuple[int, int], window: int | None) -> None:
    """Rows that see one slice, all and, with a window, the later ones; several tiles of heads. The same workspace
    serves call after call."""
    arguments = {**problem([0, 99, 80], *heads, 100, 32), "splits": 3, "window": window}
    arguments["arrivals"] = torch.zeros(3 * heads[0] + 1, dtype=torch.int32)
    for _ in range(2):
        check(arguments)
        assert not arguments["arrivals"].any()


@interpreted
def test_position_0_is_the_first_value() -> None:
    arguments = problem([0, 0], 6, 2, 40, 64)
    expected = arguments["value"][:, :, 0].repeat_interleave(3, 1)
    for splits in (1, 2):
        assert torch.equal(decode_attention(**arguments, splits=splits), expected)


@interpreted
@pytest.mark.parametrize(("slots", "splits"), [(40, 1), (40, 2), (64, 2)])  # of 64 slots, no split has the one behind
def test_positions_outside_the_buffer(slots: int, splits: int) -> None:
    """Before it: nothing is seen, zeros. Behind it: everything is."""
    arguments = {**problem([slots - 1] * 2, 4, 2, slots, 64), "splits": splits}
    everything = decode_attention(**arguments)
    arguments["position"] = torch.tensor([-1, 1000])
    found = decode_attention(**arguments)
    assert not found[0].any()
    assert torch.equal(found[1], everything[1])
    assert not decode_attention(**arguments, window=5).any()


@interpreted
def test_a_row_does_not_depend_on_batch_or_buffer() -> None:
    """Bitwise the same alone, among others and in a longer buffer, with the splits that the kernel chooses."""
    arguments = problem([0, 300, 511, 90], 6, 2, 1300, 32)
    expected = decode_attention(**arguments)
    for row in range(4):
        for slots in (512, 513, 1100):
            one = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in arguments.items()}
            one["key"], one["value"] = one["key"][:, :, :slots], one["value"][:, :, :slots]
            assert torch.equal(decode_attention(**one)[0], expected[row])


@interpreted
@pytest.mark.parametrize("window", [None, 30])
def test_strided_views(window: int | None) -> None:
    """Slots before heads, rows of a longer buffer, a query cut from a joint projection, every other position."""
    arguments = problem([3, 99, 60], 6, 2, 100, 48)
    expected = decode_attention(**arguments, window=window, splits=2)
    for name in ("key", "value"):
        buffer = torch.full((5, 120, 3, 64), torch.nan)
        view = buffer[1:4, 10:110, 1:, :48].transpose(1, 2)
        view.copy_(arguments[name])
        arguments[name] = view
    joint = torch.full((48, 6, 3, 2), torch.nan)
    joint[..., 0] = arguments["query"].permute(2, 1, 0)
    arguments["query"] = joint[..., 0].permute(2, 1, 0)
    positions = torch.full((6,), -7)
    positions[::2] = arguments["position"]
    arguments["position"] = positions[::2]
    assert torch.equal(decode_attention(**arguments, window=window, splits=2), expected)


@interpreted
@DTYPES
def test_large_scores(dtype: torch.dtype) -> None:
    arguments = problem([0, 200, 299], 4, 2, 300, 64, dtype=dtype)
    for scale in (20.0, 1e-3):
        check({**arguments, "scale": scale, "splits": 3})


def test_empty_batch() -> None:
    arguments = {k: v[:0] if torch.is_tensor(v) else v for k, v in problem([1], 4, 2, 8, 16).items()}
    assert decode_attention(**arguments).shape == (0, 4, 16)


VALID = {
    "query": torch.zeros(2, 6, 16),
    "key": torch.zeros(2, 3, 8, 16),
    "value": torch.zeros(2, 3, 8, 24),
    "position": torch.zeros(2, dtype=torch.int64),
    "scale": 0.25,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 6, 16, dtype=torch.float64)}, TypeError, "query: got torch.float64"),
        ({"query": torch.zeros(2, 6, 1, 16)}, ValueError, r"query: got shape \[2, 6, 1, 16\], expected \[B, H, d\]"),
        ({"query": torch.zeros(2, 5, 16)}, ValueError, "key: got 3 heads, expected a divisor of the query's 5"),
        ({"query": torch.zeros(2, 6, 20)}, ValueError, r"key: got shape .* expected \[2, H_kv, S, 20\]"),
        ({"key": torch.zeros(2, 3, 8, 16).half()}, TypeError, "key: got torch.float16, expected torch.float32"),
        ({"key": torch.zeros(2, 3, 16)}, ValueError, r"key: got shape \[2, 3, 16\], expected \[B, H_kv, S, d\]"),
        ({"key": torch.zeros(1, 3, 8, 16)}, ValueError, r"key: got shape .* expected \[2, H_kv, S, 16\]"),
        ({"key": torch.zeros(2, 3, 0, 16)}, ValueError, "S >= 1"),
        ({"key": torch.zeros(2, 3, 16, 8).mT}, ValueError, "key: got strides .*, expected 1 as the last one"),
        ({"value": torch.zeros(2, 3, 9, 16)}, ValueError, r"value: got shape .*, expected \[2, 3, 8\] before the last"),
        ({"value": torch.zeros(2, 3, 8, 300)}, ValueError, "value: got heads of size 300, expected 1 to 256"),
        ({"position": torch.zeros(2, dtype=torch.int32)}, TypeError, "position: got torch.int32, expected int64"),
        ({"position": torch.zeros(3, dtype=torch.int64)}, ValueError, r"position: got shape \[3\], expected \[2\]"),
        (
            {"position": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "position: got a tensor on meta, expected cpu as the query",
        ),
        ({"scale": float("nan")}, ValueError, "scale: got nan, expected a finite number > 0"),
        ({"scale": -1.0}, ValueError, "scale: got -1.0, expected a finite number > 0"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0, expected a finite number > 0"),
        ({"window": 0}, ValueError, "window: got 0, expected an integer >= 1 or None"),
        ({"arrivals": torch.zeros(12)}, TypeError, "arrivals: got torch.float32, expected int32"),
        (
            {"arrivals": torch.zeros(11, dtype=torch.int32)},
            ValueError,
            r"arrivals: got shape \[11\], expected at least \[12\]",
        ),
        ({"splits": 1.5}, ValueError, "splits: got 1.5, expected an integer >= 1 or None"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_attention(**{**VALID, **change})


def test_splits_follow_from_the_slots_alone() -> None:
    """Slices of 512, at most 64 of them; one launch for all."""
    for slots, splits in [(1, 1), (512, 1), (513, 2), (2048, 4), (32_768, 64), (100_000, 64)]:
        grids = set()
        for batch in (1, 7, 1000):
            (start,) = launches(Call("decode_attention", (batch, slots, 64, 64, 14, 2), "bfloat16"), Device(90, 132))
            grids.add(start.grid[1:])
        assert len(grids) == 1
        kv_heads, count = grids.pop()
        assert kv_heads == 2
        assert splits * 0.9 <= count <= splits  # a slice is whole blocks
