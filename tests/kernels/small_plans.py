"""Tiles so small that a few dozen rows and vocabulary entries make several of each, the last one ragged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gircse_kernels import plan
from gircse_kernels.plan import Config

SMALL = {
    "one_pass": Config({"BLOCK_T": 16, "BLOCK_V": 16}, 4, 1),
    "score": Config({"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_K": 16, "GROUP": 2}, 4, 1),
    "score_grad": Config({"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_K": 16, "GROUP": 2}, 4, 1),
    "weigh": Config({"BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_V": 16, "GROUP": 2}, 4, 1),
    "product": Config({"BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_V": 16, "GROUP": 2}, 4, 1),
    "vocab_grad": Config({"BLOCK_V": 16, "BLOCK_E": 16, "BLOCK_T": 16, "GROUP": 2}, 4, 1),
}


@contextmanager
def small_plans(one_pass: bool, *, row_block: int = 20, chunk_rows: int = 64) -> Iterator[None]:
    """Small tiles; with `one_pass` false, everything takes two. Chunks of about `chunk_rows` vocabulary entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find", lambda kernel, *_: None if kernel == "one_pass" and not one_pass else SMALL[kernel])
        patch.setattr(plan, "ROW_BLOCK", row_block)
        patch.setattr(plan, "CHUNK_BYTES", 2 * row_block * chunk_rows)
        plan.plan_forward.cache_clear()
        plan.plan_backward.cache_clear()
        yield
    plan.plan_forward.cache_clear()
    plan.plan_backward.cache_clear()
