"""A head that FSDP shards, given to soft_embed outside of the module's forward: what the error advises is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial

from gircse.ops import soft_embed
from tests.ops.test_vocab_parallel import in_processes


def loss(hidden: Tensor, weight: Any) -> Tensor:
    return soft_embed(hidden, weight).square().sum()  # type: ignore[union-attr]


def advised(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (37, 2 * 5))
    module = nn.Linear(8, 37, bias=False, dtype=torch.float64)
    module.weight.data.copy_(weight)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match=re.escape('.full_tensor(grad_placements=[Partial("avg")])')):
        loss(rows[:5], module.weight)
    whole: Any = module.weight.full_tensor(grad_placements=[Partial("avg")])  # type: ignore[operator]
    loss(rows.split(5)[rank], whole).backward()
    leaf = weight.requires_grad_()
    mean = sum(loss(part, leaf) for part in rows.split(5)) / 2
    mean.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(module.weight.grad.full_tensor(), leaf.grad, rtol=1e-12, atol=1e-13)  # type: ignore[union-attr, operator]


def test_the_advised_call_gives_the_gradient_of_the_mean_over_ranks(tmp_path: Path) -> None:
    in_processes(2, advised, tmp_path)
