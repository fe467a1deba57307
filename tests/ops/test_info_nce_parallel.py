"""What NCCL alone is asked for, with a stand-in for it, and what ranks must agree on: the rest runs on gloo in
test_info_nce_options.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import info_nce_op, info_nce_parallel, info_nce_torch
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_with_uneven_batches_make_the_same_pieces(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is an exchange: a rank that made more of them would wait for the others forever."""
    monkeypatch.setattr(info_nce_op, "VECTOR_BYTES", 600)
    module = info_nce_torch if backend == "torch" else pytest.importorskip("gircse_kernels.info_nce")
    options = info_nce_op.Options(0.02, "mean", False, False, None, None)
    found = []
    for rank, (rows, docs) in enumerate(((40, 90), (2, 3))):
        of = Shares(None, [40, 2], rank), Shares(None, [90, 3], rank)
        steps = torch.empty(rows, 3, 6), torch.empty(docs, 3, 6)
        call = info_nce_op.LossCall(module, options, *steps, torch.zeros(rows, dtype=torch.int64), None, None, *of)
        found.append([len(call.document_pieces()), len(call.query_pieces()), call.groups()])
    assert found[0] == found[1]
    assert found[0][0] > 1
