"""What NCCL alone is asked for, with a stand-in for it: the rest runs on gloo in test_info_nce.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import info_nce_parallel
from gircse.ops.info_nce_parallel import Shares, scatter_sum


@pytest.mark.parametrize("dim", [0, 1])
def test_scatter_sum_on_nccl(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with different numbers of rows, one of them without any: padded for the collective, cut after it."""
    sizes = [3, 0, 2]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in sizes]
    sent: list[Tensor] = []
    rank = 0

    def reduce_scatter_tensor(own: Tensor, padded: Tensor, group: Any) -> None:
        assert padded.is_contiguous()
        assert own.is_contiguous()
        assert padded.shape == (len(sizes), *own.shape)
        if len(sent) < len(sizes):
            sent.append(padded.clone())
        else:
            own.copy_(sum(each[rank] for each in sent))

    monkeypatch.setattr(info_nce_parallel.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(info_nce_parallel.dist, "reduce_scatter_tensor", reduce_scatter_tensor)
    for rank, tensor in enumerate(whole):  # first every rank sends, then every rank receives
        scatter_sum(tensor, Shares("group", sizes, rank), dim)
    for rank, tensor in enumerate(whole):
        shares = Shares("group", sizes, rank)
        found = scatter_sum(tensor, shares, dim)
        torch.testing.assert_close(found, sum(whole).narrow(dim, shares.start, sizes[rank]), rtol=1e-14, atol=0)  # type: ignore[union-attr]
