"""Large contrastive batches in bounded memory: gradient caching (Gao et al., arXiv 2101.06983) over rollouts.

The loss needs the states of all texts of a batch at once; the activations behind them are needed for backward only. So

    1. embed every micro-batch without autograd and keep its states [b, K, D] (the last one with autograd, and whole),
    2. take the gradient of the loss with respect to all of them, once,
    3. embed every micro-batch but the last again, with autograd, and send its part of that gradient through it.

Only one micro-batch's activations live at a time, for nearly one more forward pass. The second pass starts from the
random state of the first, so dropout falls on the same places and the gradient is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gircse.encode.tokens import pad

Embed = Callable[[Tensor, Tensor], Tensor]
More = TypeVar("More")


class MicroBatch(NamedTuple):
    """Texts that go through the model together.

    Attributes:
        rows: [b] int64, their places in the batch; none: the pass is made, and what comes out is not used.
        input_ids, attention_mask: [b, N] int64, padded on the right to the longest of them.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], ids: Sequence[Sequence[int]], *, pad_id: int) -> MicroBatch:
        """The texts `rows` of `ids`."""
        return cls(torch.tensor(rows, dtype=torch.int64), *pad([ids[row] for row in rows], pad_id=pad_id))

    def unused(self) -> MicroBatch:
        """A pass with one short text whose result does not count: for a rank that has fewer micro-batches than others
        where every rank must make the same number of passes."""
        return MicroBatch(self.rows[:0], self.input_ids[:1], self.attention_mask[:1])


def micro_batches(ids: Sequence[Sequence[int]], budget: int, *, num_steps: int, pad_id: int) -> list[MicroBatch]:
    """Shares texts out by length, longest first, so that little of a micro-batch is padding.

    Args:
        ids: token ids of each text.
        budget: most positions of a micro-batch: texts x (tokens of its longest + num_steps). A text beyond it goes
            alone.
        num_steps: K, which every text adds.
    """
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    found: list[list[int]] = []
    for row in order:
        if found and (len(found[-1]) + 1) * (len(ids[found[-1][0]]) + num_steps) <= budget:
            found[-1].append(row)
        else:
            found.append([row])
    return [MicroBatch.of(rows, ids, pad_id=pad_id) for rows in found]


def positions(batches: Sequence[MicroBatch], num_steps: int) -> int:
    """Of all of them together, padding and K steps included: what a budget is compared with."""
    return sum(b.input_ids.shape[0] * (b.input_ids.shape[1] + num_steps) for b in batches)


def backward(
    embed: Embed, batches: Sequence[MicroBatch], objective: Callable[[Tensor], tuple[Tensor, More]], *, cached: bool
) -> tuple[Tensor, More]:
    """Adds the gradient of `objective(states of all texts)` to the parameters' `.grad`.

    Args:
        embed: token ids and mask [b, N] -> states [b, K, D]; called in the order of `batches`.
        batches: each text of the batch in one of them.
        objective: states [T, K, D] in the order of the texts -> (scalar loss, anything). It must reach the parameters
            through the states alone.
        cached: one micro-batch's activations at a time, by gradient caching; otherwise all of them at once.

    Returns:
        (loss, anything) of `objective`, the loss without its graph.
    """
    if not cached:
        loss, more = objective(_in_order([embed(*b[1:])[: len(b.rows)] for b in batches], batches))
        loss.backward()
        return loss.detach(), more

    states, randoms = [], []
    with torch.no_grad():
        for batch in batches[:-1]:
            randoms.append(RandomState.now())
            states.append(embed(*batch[1:])[: len(batch.rows)])
    kept = embed(*batches[-1][1:])
    leaf = _in_order([*states, kept.detach()[: len(batches[-1].rows)]], batches).requires_grad_()
    loss, more = objective(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    _send(gradient, batches[-1], kept)
    del states, leaf, kept
    for batch, random in zip(batches, randoms, strict=False):
        with random.replayed():
            replay = embed(*batch[1:])
        _send(gradient, batch, replay)
        del replay
    return loss.detach(), more


def _send(gradient: Tensor, batch: MicroBatch, states: Tensor) -> None:
    """Back through the states of one micro-batch; zeros for those that are not used."""
    part = torch.zeros_like(states)
    part[: len(batch.rows)] = gradient[batch.rows.to(gradient.device)]
    states.backward(part)


def _in_order(states: Sequence[Tensor], batches: Sequence[MicroBatch]) -> Tensor:
    """The rows of all micro-batches, where they belong."""
    together = torch.cat(list(states))
    order = torch.cat([batch.rows for batch in batches]).argsort()
    if torch.equal(order, torch.arange(len(order))):
        return together
    return together[order.to(together.device)]


class RandomState:
    """The state of PyTorch's generators on the CPU and, if it is in use, on the current CUDA device."""

    def __init__(self, cpu: Tensor, cuda: Tensor | None) -> None:
        self.cpu, self.cuda = cpu, cuda

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers come from this state on; afterwards as if nothing had been drawn."""
        before = RandomState.now()
        self.restore()
        try:
            yield
        finally:
            before.restore()
