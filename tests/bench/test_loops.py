"""The inner loops of forms 1 and 2 against those that were timed on an H200: options that are off cost nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.provenance import checkout_environment


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    """In a process of its own: here the kernels may belong to the interpreter."""
    command = [sys.executable, "-m", "bench.static.loops", "--json"]
    environment = checkout_environment(TRITON_INTERPRET="0")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case["name"]: case for case in json.loads(done.stdout)}


@pytest.mark.parametrize("name", ["one row, D = 896", "16 rows, D = 896", "32 rows, D = 896"])
def test_the_loop_is_the_timed_one(cases: dict[str, dict[str, Any]], name: str) -> None:
    """Within 5% in every kind of instruction, in registers and in shared memory."""
    case = cases[name]
    assert case["same config"]  # the table holds what was timed
    timed, ours = case["timed"], case["ours"]
    if timed is None:
        pytest.skip("nobody counted the timed loop with this Triton")
    for kind, count in ours["counts"].items():
        assert count <= max(1.05 * timed["counts"].get(kind, 0), timed["counts"].get(kind, 0) + 3), kind
    for total in (lambda loop: sum(loop["counts"].values()), lambda loop: loop["registers"]):
        assert total(ours) <= 1.05 * total(timed)
    assert ours["shared"] <= 1.05 * timed["shared"]


def test_wide_rows_read_less_shared_memory_than_the_timed_loop(cases: dict[str, dict[str, Any]]) -> None:
    """D = 2048: shared memory was the limit of the timed kernel. Counted for each vocabulary entry, of which our tile
    has half as many; the number of warps is the same."""
    case = cases["16 rows, D = 2048"]
    if case["timed"] is None:
        pytest.skip("nobody counted the timed loop with this Triton")
    loads = {which: case[which]["counts"]["shared load"] for which in ("timed", "ours")}
    assert loads["ours"] / 16 <= 0.6 * loads["timed"] / 32
    assert case["ours"]["counts"]["tensor core"] / 16 <= 0.7 * case["timed"]["counts"]["tensor core"] / 32
