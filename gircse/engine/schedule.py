"""Which rows make a decode batch, and which of them are prefilled together, on plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gircse.engine.config import Limits

# A shorter common beginning is not worth a separate pass and the copies.
MIN_PREFIX = 4


@dataclass(frozen=True)
class DecodeBatch:
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
    """Indices, longest first. The rows of a batch are then about equally long, the first batch is the largest, and a
    progress bar overestimates the time left."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def next_batch(
    order: Sequence[int], lengths: Sequence[int], limits: Limits, num_steps: int, *, prefix: int = 0
) -> DecodeBatch:
    """The decode batch at the front of `order` (longest first; not empty).

    It is the same for every K up to `STEPS_BUCKET`. The first `prefix` tokens of every row are already encoded.
    """
    longest = lengths[order[0]]
    slots = limits.slots(longest, num_steps)
    rows = max(1, min(limits.rows, limits.kv_tokens // slots, len(order)))
    if not num_steps:  # no step reads the keys and values again, so they need not all be kept
        rows = min(rows, max(1, limits.prefill_tokens // (longest - prefix)))
    buffer_rows = limits.buffer_rows(rows)
    if buffer_rows > rows and buffer_rows * slots > limits.kv_tokens:
        buffer_rows //= 2  # the spare rows do not fit, so take the power of two below
        rows = min(rows, buffer_rows)
    chosen = list(order[:rows])
    prefills, start = [], 0
    while start < rows:
        count = max(1, limits.prefill_tokens // (lengths[chosen[start]] - prefix))
        prefills.append((start, min(start + count, rows)))
        start += count
    return DecodeBatch(chosen, prefills, slots, buffer_rows)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all rows start with, at most one less than the shortest row; 0 below `MIN_PREFIX`."""
    if len(rows) < 2:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))  # every row is between these two in dictionary order
    length = min(min(map(len, rows)) - 1, len(first), len(last))
    same = next((i for i in range(length) if first[i] != last[i]), length)
    return same if same >= MIN_PREFIX else 0
