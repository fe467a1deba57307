"""Packed prefill on PyTorch's flash-attention, which only a GPU has: the CPU gets a plain operator of the same name,
schema and meaning, so that every index and length that is handed to it is checked in float64."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gircse.engine import EngineConfig, varlen
from gircse.lm.attention import causal_attention, causal_band
from tests.engine.test_engine import engine_of, plain, relative_error, rows_of


def flash(
    query, key, value, starts, key_starts, longest, longest_key, dropout, causal, debug, *,
    scale, window_size_left, window_size_right, seqused_k, aligned="right", **_,
):  # fmt: skip
    """The last query of a text sees the last of its keys, as `flash_attn_varlen_func` documents it."""
    out = torch.full_like(query, float("nan"))
    assert (dropout, debug, window_size_right, causal) == (0.0, False, 0, window_size_left < 0)
    for text, (first, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        used, place = int(seqused_k[text]), int(key_starts[text])
        assert end - first <= longest
        assert used <= longest_key
        assert place + used <= len(key)  # a GPU would read what lies behind the buffer
        keys, values = (buffer[place : place + used].transpose(0, 1)[None] for buffer in (key, value))
        window = None if window_size_left < 0 else window_size_left + 1
        before = used - (end - first) if aligned == "right" else 0
        mask = causal_band(end - first, before, window=window, device=query.device)
        mask = torch.nn.functional.pad(mask, (0, used - mask.shape[-1]))
        row = query[first:end].transpose(0, 1)[None]
        out[first:end] = causal_attention(row, keys, values, mask=mask, scaling=scale)[0].transpose(0, 1)
    return out, query.new_empty(0), query.new_empty(0), query.new_empty(0), query.new_empty(0)


@pytest.fixture
def operator(request):
    options = getattr(request, "param", {})
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", lambda *args, **kw: flash(*args, **kw, **options), "CPU")
        varlen._is_right.cache_clear()
        yield
    varlen._is_right.cache_clear()


@pytest.mark.parametrize("name", ["mistral", "gemma3"])  # full attention, and windows shorter than the prompts
def test_engine_on_the_operator_equals_the_stock_model(name, operator, no_downcast, monkeypatch):
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    rows = rows_of((12, 1, 7, 3), prefix=9)
    expected = plain(name, rows, 2)
    engine = engine_of(name, EngineConfig(prefill_tokens=30))
    for reuse in (True, False):
        engine.config = EngineConfig(reuse_prefix=reuse)
        assert relative_error(engine.states(rows, 2), expected) <= 1e-9


def test_the_operator_is_compared_with_plain_attention(operator):
    assert varlen._is_right(torch.device("cpu"), torch.bfloat16, 3, 16)


@pytest.mark.parametrize(
    ("operator", "message"),
    [({"aligned": "left"}, "differs from plain attention"), ({"unknown": 1, "scale": 2}, "TypeError")],
    indirect=["operator"],
)
def test_a_wrong_operator_is_not_used(operator, message):
    with pytest.warns(UserWarning, match=f"prefill pads the texts of a batch.*{message}"):
        assert not varlen._is_right(torch.device("cpu"), torch.bfloat16, 3, 16)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"size": 64, "dtype": torch.float16}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"softcap": 30.0}, False),
        ({"size": 20}, False),
        ({"size": 264}, False),
        ({"value_size": 24}, False),
        ({"slots": 1 << 30}, False),
    ],
)
def test_where_the_operator_is_used(monkeypatch, change, expected):
    case = {"device": "cuda", "dtype": torch.bfloat16, "softcap": None, "size": 16, "slots": 8, **change}
    monkeypatch.setattr(varlen, "_is_right", lambda *_: True)
    with FakeTensorMode():
        options = {"device": case["device"], "dtype": case["dtype"]}
        query = torch.empty(5, 4, case["size"], **options)
        keys = torch.empty(1, 2, case["slots"], case["size"], **options)
        values = torch.empty(1, 2, case["slots"], case.get("value_size", case["size"]), **options)
        assert varlen.usable(query, keys, values, case["softcap"]) is expected
