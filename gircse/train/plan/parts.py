"""The micro-batches that a training step would be divided into, by the rules of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from gircse.train.capture.bucket import bucket_shape
from gircse.train.grad_cache import groups
from gircse.train.plan.meta_step import PromptShape


class Part(NamedTuple):
    """A micro-batch.

    Attributes:
        lengths: tokens of its texts.
        shape: of the tensor that goes through the model, the padding of buckets included.
    """

    lengths: tuple[int, ...]
    shape: PromptShape


class Parts(NamedTuple):
    """The micro-batches of a step.

    Attributes:
        each: {micro-batch: how many of them there are}.
        cached: whether gradient caching runs them one after the other.
    """

    each: Counter[Part]
    cached: bool

    @classmethod
    def of(cls, lengths: Sequence[int], budget: int | None, num_steps: int, *, graphs: bool) -> Parts:
        """See `gircse.train.step.backward_of`.

        Args:
            lengths: tokens of all texts of a rank.
            budget: positions of a micro-batch, None for any number.
            graphs: micro-batches become CUDA graphs.
        """
        padded = partial(bucket_shape, num_steps=num_steps) if graphs else None
        each: Counter[Part] = Counter()
        positions = 0
        for rows in groups(lengths, budget, num_steps=num_steps, padded=padded):
            own = tuple(lengths[row] for row in rows)
            shape = len(own), own[0]
            positions += len(own) * (own[0] + num_steps)
            each[Part(own, PromptShape(*(shape if padded is None else padded(*shape))))] += 1
        cached = (budget is not None and positions > budget) or (graphs and each.total() > 1)
        return cls(each, cached)

    @property
    def shapes(self) -> list[PromptShape]:
        """Of all micro-batches."""
        return [part.shape for part in self.each.elements()]


def largest_bucket(rows: int, length: int, num_steps: int) -> int:
    """The most texts, up to `rows`, that are a bucket of their own."""
    return next(count for count in range(rows, 0, -1) if bucket_shape(count, length, num_steps=num_steps)[0] == count)
