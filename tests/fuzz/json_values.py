"""JSON values that no writer of a file has meant, and files that are not what their names say."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

from hypothesis import strategies as st

texts = st.text(max_size=6) | st.sampled_from(["", " ", "\0", "\ufeff", "\ud800", "e\u0301", "a" * 300, "../x", "nf4"])
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, 1e308, 5e-324, float("nan")])
)
scalars = st.none() | st.booleans() | numbers | texts
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)

DEEP = b"[" * 100_000
ODD_LINES = [
    b"",
    b" \t",
    b"null",
    b"{",
    b"\xff\xfe",
    b"\xc3",
    b"\x00",
    b"NaN",
    b'{"a": 1, "a": 2}',
    b'"\\ud800"',
    DEEP,
    b'{"query": ' + DEEP,
    b"1" * 5000,
    b'{"label": ' + b"1" * 5000 + b"}",
    b"\xef\xbb\xbf",
]


def damaged(content: bytes, draw: Any) -> bytes:
    """Cut, changed, doubled, packed, or with something in between."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "gzip", "cut gzip", "noise", "whole"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:place]
    if kind == "flip" and content:
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=4) | st.sampled_from(ODD_LINES)) + content[place:]
    if kind == "repeat":
        return content[:place] + content
    if kind == "gzip":
        return gzip.compress(content, mtime=0)
    if kind == "cut gzip":
        packed = gzip.compress(content, mtime=0)
        return packed[: place % len(packed)]
    if kind == "noise":
        return random.Random(place).randbytes(place % 200)
    return content


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()
