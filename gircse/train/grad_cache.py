"""Large contrastive batches in bounded memory: gradient caching (Gao et al., arXiv 2101.06983) over rollouts.

The loss needs the states of all texts of a batch at once. The activations behind them are needed in backward only.

    1. Every micro-batch is embedded without autograd and only its states [b, K, D] are kept. The last one is embedded
       with autograd and keeps its activations.
    2. The gradient of the loss with respect to all states is computed once.
    3. Every micro-batch but the last is embedded again with autograd, and its part of that gradient goes through it.

So the activations of one micro-batch live at a time, at the cost of nearly one more forward pass. The second pass
starts from the random state of the first, so dropout masks are the same and the gradient is that of the whole batch.
Soft tokens that are drafted (`gircse.lm.rollout`, "by the block") are kept from the first pass for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from gircse.encode.tokens import pad
from gircse.lm.rollout import Drafter, KeptDraft

Extra = TypeVar("Extra")


class Embed(Protocol):
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, *, drafter: Drafter) -> Tensor:
        """Token ids and mask [b, N] -> states [b, K, D]; soft tokens are drafted by `drafter` if at all."""


class MicroBatch(NamedTuple):
    """Texts that go through the model together.

    Attributes:
        rows: [b] int64, index of each text in the batch. Empty for a padding pass whose output is discarded.
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
        """A padding pass with one text, for a rank that has fewer micro-batches than the others where all ranks must
        make the same number of passes."""
        return MicroBatch(self.rows[:0], self.input_ids[:1], self.attention_mask[:1])


# Texts and tokens of the longest -> the same of the tensor that goes through the model.
Padded = Callable[[int, int], tuple[int, int]]


def micro_batches(
    ids: Sequence[Sequence[int]], budget: int | None, *, num_steps: int, pad_id: int, padded: Padded | None = None
) -> list[MicroBatch]:
    """Divides texts by length, so that micro-batches need little padding. The one of most positions comes last, because
    gradient caching embeds the last one only once.

    Args:
        ids: token ids of each text.
        budget, num_steps, padded: see `groups`.
    """
    parts = groups(list(map(len, ids)), budget, num_steps=num_steps, padded=padded)
    batches = [MicroBatch.of(sorted(rows), ids, pad_id=pad_id) for rows in parts]
    return sorted(batches, key=lambda batch: positions([batch], num_steps))


def groups(
    lengths: Sequence[int], budget: int | None, *, num_steps: int, padded: Padded | None = None
) -> list[list[int]]:
    """The texts of each micro-batch, by index, the longest first.

    A micro-batch holds no text of less than half the positions of its longest. So texts of one length go together, and
    short ones cost no more than twice their positions.

    Args:
        lengths: tokens of each text.
        budget: the most positions of a micro-batch, texts x (tokens of its longest + num_steps). A text that exceeds
            it goes alone. None: no limit.
        num_steps: K, which every text adds.
        padded: the shape that counts for the budget, where micro-batches are padded further.
    """
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts:
            longest = lengths[parts[-1][0]]
            shape = len(parts[-1]) + 1, longest
            texts, tokens = shape if padded is None else padded(*shape)
            fits = budget is None or texts * (tokens + num_steps) <= budget
            if fits and 2 * (lengths[row] + num_steps) >= longest + num_steps:
                parts[-1].append(row)
                continue
        parts.append([row])
    return parts


def positions(batches: Sequence[MicroBatch], num_steps: int) -> int:
    """The positions of all micro-batches together, padding and K steps included."""
    return sum(b.input_ids.shape[0] * (b.input_ids.shape[1] + num_steps) for b in batches)


def backward(
    embed: Embed,
    batches: Sequence[MicroBatch],
    objective: Callable[[Tensor], tuple[Tensor, Extra]],
    *,
    cached: bool,
    drafter: Drafter | None = None,
) -> tuple[Tensor, Extra]:
    """Adds the gradient of `objective(states of all texts)` to the parameters' `.grad`.

    Args:
        embed: called in the order of `batches`.
        batches: each text of the batch is in one of them.
        objective: states [T, K, D] in the order of the texts -> (scalar loss, anything). It must depend on the
            parameters through the states only.
        cached: keep the activations of one micro-batch at a time, by gradient caching; otherwise of all.
        drafter: drafts the soft tokens of each micro-batch, once; default: `gircse.lm.rollout.draft`.

    Returns:
        (loss, anything) of `objective`, the loss without its graph.
    """
    drafts = [KeptDraft(drafter) for _ in batches]
    passes = [partial(embed, *batch[1:], drafter=draft) for batch, draft in zip(batches, drafts, strict=True)]
    if not cached:
        states = [run()[: len(batch.rows)] for run, batch in zip(passes, batches, strict=True)]
        loss, extra = objective(_in_order(states, batches))
        loss.backward()
        return loss.detach(), extra

    states, randoms = [], []
    with torch.no_grad():
        for run, batch in zip(passes[:-1], batches, strict=False):
            randoms.append(random_state())
            states.append(run()[: len(batch.rows)])
    kept = passes[-1]()
    leaf = _in_order([*states, kept.detach()[: len(batches[-1].rows)]], batches).requires_grad_()
    loss, extra = objective(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    _send(gradient, batches[-1], kept)
    del states, leaf, kept
    for run, batch, random in zip(passes, batches, randoms, strict=False):
        with replayed(random):
            replay = run()
        _send(gradient, batch, replay)
        del replay
    return loss.detach(), extra


def _send(gradient: Tensor, batch: MicroBatch, states: Tensor) -> None:
    """Sends its part of the gradient through the states of one micro-batch; discarded states get zeros."""
    part = torch.zeros_like(states)
    part[: len(batch.rows)] = gradient[batch.rows.to(gradient.device)]
    states.backward(part)


def _in_order(states: Sequence[Tensor], batches: Sequence[MicroBatch]) -> Tensor:
    """The states of all micro-batches in the order of the batch."""
    together = torch.cat(list(states))
    order = torch.cat([batch.rows for batch in batches]).argsort()
    if torch.equal(order, torch.arange(len(order))):
        return together
    return together[order.to(together.device)]


def random_state() -> tuple[Tensor, Tensor | None]:
    """The state of PyTorch's generators on the CPU and, where CUDA is in use, on the current device."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


@contextmanager
def replayed(state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Draws from this state inside the block. Afterwards the generators are as they were before it."""
    cpu, cuda = state
    with torch.random.fork_rng([] if cuda is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        yield
