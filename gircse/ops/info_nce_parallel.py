"""What ranks exchange for a contrastive loss over all their candidates.

An all-gather of the pooled unit vectors, not a ring: a few steps of all candidates at a time, or, where not even one
step's fit, a piece of every rank's. So no rank ever holds another's whole batch. A ring takes as long
(docs/kernels.md). Batches may differ in size between ranks: each
sends as many rows as the largest has. In backward the gradients of the gathered vectors are added up over the ranks
and each keeps its own rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

GRAIN = 128  # sizes that cuBLAS and the torch backend's tiles like


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


class Piece(NamedTuple):
    """Some of every rank's candidates, which are gathered at a time."""

    local: slice  # of this rank's candidates
    over: Shares  # how many of each rank's
    columns: list[slice]  # where each rank's are among all candidates

    def locate(self, index: Tensor) -> Tensor:
        """Positions in the piece of this rank's candidates ``index``; -1: not in it."""
        inside = (index >= self.local.start) & (index < self.local.stop)
        return torch.where(inside, index - self.local.start + self.over.start, -1)

    def pick(self, mask: Tensor | None) -> Tensor | None:
        """The piece's columns of a mask [B, all candidates]."""
        if mask is None or len(self.columns) == 1:
            return mask if mask is None else mask[:, self.columns[0]]
        return torch.cat([mask[:, columns] for columns in self.columns], 1)


def pieces(over: Shares, most: int) -> list[Piece]:
    """The fewest even pieces of at most ``most`` candidates of each rank; all ranks make the same ones."""
    longest = max(over.sizes)
    grain = min(GRAIN, most)
    most -= most % grain
    size = -(-longest // -(-longest // most))
    if size < longest:
        size += -size % grain
    found = []
    for first in range(0, longest, size):
        spans = [(min(first, rows), min(first + size, rows)) for rows in over.sizes]
        starts = [sum(over.sizes[:rank]) for rank in range(len(over.sizes))]
        columns = [slice(start + a, start + b) for start, (a, b) in zip(starts, spans, strict=True)]
        sizes = [b - a for a, b in spans]
        found.append(Piece(slice(*spans[over.rank]), Shares(over.group, sizes, over.rank), columns))
    return found


def gather(tensor: Tensor, over: Shares, dim: int) -> Tensor:
    """The concatenation of all ranks' tensors along ``dim``, this rank's in its place; contiguous."""
    if over.group is None:
        return tensor.contiguous()
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
