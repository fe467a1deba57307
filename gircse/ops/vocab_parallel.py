"""A vocabulary in shards, one on each rank: what they exchange so that the result is the unsharded one.

Each rank scans its own rows of the head (and of the embedding matrix) and gets mergeable softmax sums. Exchanged are
the row maxima [T], then the rescaled sums [T, E + 2] in one all-reduce; in backward the gradients of hidden [T, D] and
of the temperatures, each the sum of the ranks' shares. Matrices never move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gircse.integers import as_integer

from .soft_embed_torch import LOG_FLOOR, OnlineState


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a vocabulary: rows ``start`` to ``stop - 1`` of the whole matrices.

    The shards of all ranks of the group must cover the vocabulary without gaps or overlaps; they may differ in size.

    Attributes:
        start: first row, >= 0.
        stop: one beyond the last, >= start: a rank may have no rows.
        group: a `torch.distributed` process group; None: the default one.
    """

    start: int
    stop: int
    group: Any = None

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("stop", self.stop)):
            integer = as_integer(value)
            if integer is None:
                raise TypeError(f"VocabShard.{name}: got {type(value).__name__}, expected an int")
            object.__setattr__(self, name, integer)
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"VocabShard: got start {self.start} and stop {self.stop}, expected 0 <= start <= stop")

    @classmethod
    def even(cls, num_vocab: int, group: Any = None) -> VocabShard:
        """This rank's shard of the most even division, the larger ones first."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return cls(_bound(num_vocab, rank, size), _bound(num_vocab, rank + 1, size), group)


def _bound(num_vocab: int, rank: int, size: int) -> int:
    return rank * (num_vocab // size) + min(rank, num_vocab % size)


def group_name(shard: VocabShard) -> str:
    """The name under which a custom op finds the group again.

    Raises:
        RuntimeError: torch.distributed is not initialised. TypeError: not a process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("vocab_parallel: torch.distributed is not initialised, expected a process group")
    group = dist.group.WORLD if shard.group is None else shard.group
    name = getattr(group, "group_name", None)
    if name is None:
        raise TypeError(f"vocab_parallel: got a group of type {type(group).__name__}, expected a ProcessGroup")
    return name


def find_group(name: Any) -> Any:
    """The process group of that name."""
    return dist.distributed_c10d._resolve_process_group(name)


def merge_shards(state: OnlineState, start: int, group: Any) -> OnlineState:
    """The softmax sums of the whole vocabulary on every rank; ``argmax`` becomes an index into it."""
    peak = state.peak.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shift = state.peak - peak
    decay = shift.exp()
    sums = [state.acc * decay, state.total * decay]
    if state.moment is not None:
        sums.append((state.moment + shift.clamp_min(LOG_FLOOR) * state.total) * decay)
    packed = torch.cat(sums, 1)
    dist.all_reduce(packed, group=group)
    width = state.acc.shape[1]
    argmax = None
    if state.argmax is not None:
        none = torch.iinfo(torch.int64).max
        argmax = torch.where(state.peak == peak, state.argmax + start, none)
        dist.all_reduce(argmax, dist.ReduceOp.MIN, group=group)
        argmax = torch.where(argmax == none, 0, argmax)  # a row of NaN: any valid index
    moment = packed[:, width + 1 :] if state.moment is not None else None
    return OnlineState(peak, packed[:, width : width + 1], packed[:, :width].contiguous(), moment, argmax)


class Across:
    """Reductions over the shards of a vocabulary, in place; without a group nothing."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.group)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "SUM")

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "MAX")

    def min(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "MIN")

    def largest(self, size: int, device: torch.device) -> int:
        """Blocks must be the same on every rank, whatever the size of its shard. Waits for the device."""
        return size if self.group is None else int(self.max(torch.tensor([size], device=device)).item())

    def gather(self, tensor: Tensor) -> Tensor:
        """[T, C] of every rank side by side."""
        if self.group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, 1)


class SumGradient(torch.autograd.Function):
    """A tensor that is the same on every rank, whose gradient is the sum of what the ranks find for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Across(ctx.group).sum(grad.clone()), None


def sum_shards(tensor: Tensor | None, group: Any) -> Tensor | None:
    """The sum over the ranks, in place."""
    if tensor is not None:
        dist.all_reduce(tensor, group=group)
    return tensor
