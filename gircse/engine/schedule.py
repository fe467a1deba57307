"""Which rows make a decode batch, and which of them are prefilled together. Plain integers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gircse.engine.config import Limits

# A shorter common beginning is not worth a pass of its own and the copies.
MIN_PREFIX = 4


@dataclass(frozen=True)
class Batch:
    """One decode batch.

    Attributes:
        rows: indices of its rows, longest first.
        prefills: (start, stop) ranges of `rows` that are prefilled together.
        slots: slots of a row in the KV pool.
        buffer_rows: rows of the buffers, >= len(rows).
    """

    rows: list[int]
    prefills: list[tuple[int, int]]
    slots: int
    buffer_rows: int


def by_length(lengths: Sequence[int]) -> list[int]:
    """Indices, longest first: rows of a batch are alike, the largest batch comes at once, and the time left is
    overestimated."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def next_batch(
    order: Sequence[int], lengths: Sequence[int], limits: Limits, num_steps: int, *, prefix: int = 0
) -> Batch:
    """The decode batch at the front of `order` (longest first; not empty).

    Does not depend on K up to `STEPS_BUCKET`. The first `prefix` tokens of every row are prefilled already.
    """
    longest = lengths[order[0]]
    slots = limits.slots(longest, num_steps)
    rows = max(1, min(limits.rows, limits.kv_tokens // slots, len(order)))
    if not num_steps:  # nobody reads the keys and values again: they need not all be kept
        rows = min(rows, max(1, limits.prefill_tokens // (longest - prefix)))
    buffer_rows = limits.buffer_rows(rows)
    if buffer_rows > rows and buffer_rows * slots > limits.kv_tokens:
        buffer_rows //= 2  # the spare rows do not fit: the power of two below
        rows = min(rows, buffer_rows)
    chosen = list(order[:rows])
    prefills, start = [], 0
    while start < rows:
        count = max(1, limits.prefill_tokens // (lengths[chosen[start]] - prefix))
        prefills.append((start, min(start + count, rows)))
        start += count
    return Batch(chosen, prefills, slots, buffer_rows)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all rows start with, leaving each at least one of its own; 0 where it is not worth it."""
    if len(rows) < 2:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))  # every row lies between these two in dictionary order
    length = min(min(map(len, rows)) - 1, len(first), len(last))
    same = next((i for i in range(length) if first[i] != last[i]), length)
    return same if same >= MIN_PREFIX else 0
