"""What ranks exchange for a contrastive loss over all their candidates.

An all-gather of the pooled unit vectors, not a ring: they are [M, K, D] however long the texts were, little beside the
activations they come from, and gathered a bounded group of steps at a time. A ring takes as long
(bench/info_nce_ring.py is one; docs/kernels.md has the measurement). Batches may differ in size between ranks: each
sends as many rows as the largest has. In backward the gradients of the gathered vectors are
added up over the ranks and each keeps its own rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shares(NamedTuple):
    """How many rows each rank has, and which of the whole are this rank's."""

    group: Any
    sizes: list[int]
    rank: int

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def mine(self) -> slice:
        return slice(self.start, self.start + self.sizes[self.rank])


def shares(size: int, group: Any, device: torch.device) -> Shares:
    """Exchanges the sizes; the host waits for them once."""
    if group is None:
        return Shares(None, [size], 0)
    own = torch.tensor([size], device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return Shares(group, [int(each) for each in torch.cat(found).tolist()], dist.get_rank(group))


def gather(tensor: Tensor, over: Shares, dim: int) -> Tensor:
    """The concatenation of all ranks' tensors along ``dim``, this rank's in its place."""
    if over.group is None:
        return tensor
    moved = tensor.movedim(dim, 0)
    padded = moved.new_zeros((max(over.sizes), *moved.shape[1:]))
    padded[: moved.shape[0]] = moved
    found = [torch.empty_like(padded) for _ in over.sizes]
    dist.all_gather(found, padded, group=over.group)
    return torch.cat([part[:size] for part, size in zip(found, over.sizes, strict=True)]).movedim(0, dim).contiguous()


def scatter_sum(tensor: Tensor, over: Shares, dim: int) -> Tensor:
    """The sum over the ranks of what `gather` made, this rank's part of it."""
    if over.group is None:
        return tensor
    if dist.get_backend(over.group) == "nccl":
        moved = tensor.movedim(dim, 0)
        padded = moved.new_zeros((len(over.sizes), max(over.sizes), *moved.shape[1:]))
        for part, rows in zip(padded, moved.split(over.sizes), strict=True):
            part[: rows.shape[0]] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(own, padded, group=over.group)
        return own[: over.sizes[over.rank]].movedim(0, dim)
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=over.group)
    return tensor.narrow(dim, over.start, over.sizes[over.rank])


def total(tensor: Tensor, over: Shares) -> Tensor:
    """The sum over the ranks, in place."""
    if over.group is not None:
        dist.all_reduce(tensor, group=over.group)
    return tensor
