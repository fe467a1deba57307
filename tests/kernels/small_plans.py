"""Tiles so small that a few dozen rows and vocabulary entries make several of each, the last one ragged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gircse_kernels import plan
from gircse_kernels.plan import Choice, Config

SMALL = {
    "one_row": Config({"BLOCK_V": 8, "PIECE": 16}, 4, 2),
    "few_rows": Config({"BLOCK_T": 16, "BLOCK_V": 16, "PIECE": 16, "GROUPS": 1}, 4, 2),
    "matmul": Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2}, 4, 1),
    "weights": Config({"BLOCK_T": 8, "BLOCK_V": 32}, 4, 1),
    "weights_product": Config({"BLOCK_T": 16, "BLOCK_V": 16, "BLOCK_K": 16}, 4, 1),
    "score_grad": Config({"BLOCK_T": 8, "BLOCK_V": 32}, 4, 1),
    "select": Config({"GROUP": 4, "WALK": 8, "BLOCK": 64, "ROOM": 32}, 4, 1),
    "kept_forward": Config({"BLOCK_C": 8, "BLOCK_E": 16}, 4, 1),
    "kept_backward": Config({"BLOCK_C": 8, "BLOCK_E": 16}, 4, 1),
    "kept_overflow": Config({"BLOCK_C": 8, "BLOCK_E": 16}, 4, 1),
    "kept_matrix": Config({"BLOCK_C": 2, "BLOCK_E": 16}, 4, 1),
}


@contextmanager
def small_plans(
    whole_rows: bool,
    *,
    row_block: int = 20,
    chunk_rows: int = 64,
    epilogue: bool = False,
    half_scores: bool = False,
    kept: int = 0,
) -> Iterator[None]:
    """Small tiles; without `whole_rows`, form 3 for everything. Chunks of about `chunk_rows` vocabulary entries."""
    left_out = () if whole_rows else ("one_row", "few_rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find", lambda kernel, *_: None if kernel in left_out else SMALL[kernel])
        patch.setattr(plan, "choose", lambda *_: Choice(epilogue, half_scores, 64))
        patch.setattr(plan, "ROW_BLOCK", row_block)
        patch.setattr(plan, "SCRATCH_BYTES", 4 * row_block * chunk_rows)
        patch.setattr(plan, "KEPT_BYTES", kept)
        _forget()
        yield
    _forget()


def _forget() -> None:
    for function in (plan.plan_forward, plan.plan_two_products, plan.plan_backward, plan.plan_select):
        function.cache_clear()
