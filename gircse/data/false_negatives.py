"""Which candidates of a contrastive batch are right answers that would be punished as wrong ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def false_negatives(
    queries: Sequence[Hashable],
    candidates: Sequence[Hashable],
    target: Sequence[int],
    *,
    other_positives: Sequence[Collection[Hashable]] = (),
    include_queries: bool = False,
) -> Tensor | None:
    """The `mask` of `gircse.ops.stepwise_info_nce` for a batch whose texts may repeat.

    Right for a row are its query itself and the positives of every row of the batch with that query. What is right for
    a row and is not its own target does not count for it. Texts are told apart by whatever they are given as (strings,
    tuples of token ids, ..): the same text must be an equal value.

    Args:
        queries: of B rows.
        candidates: M of them.
        target: B places among the candidates, each row's positive.
        other_positives: for each row the positives that are not among the candidates; empty: there are none.
        include_queries: the other queries are candidates too.

    Returns:
        [B, M] bool, with `include_queries` [B, M + B], True where a candidate does not count; None where all count.
    """
    import torch

    right: dict[Hashable, set[Hashable]] = defaultdict(set)
    for row, query in enumerate(queries):
        right[query].update((query, candidates[target[row]]), other_positives[row] if other_positives else ())
    everything = [*candidates, *queries] if include_queries else candidates
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, text in enumerate(everything):
        places[text].append(place)
    masked = [
        (row, place)
        for row, query in enumerate(queries)
        for text in right[query]
        for place in places.get(text, ())
        if place != target[row] and place != len(candidates) + row
    ]
    if not masked:
        return None
    mask = torch.zeros(len(queries), len(everything), dtype=torch.bool)
    mask[tuple(torch.tensor(masked).T)] = True
    return mask
