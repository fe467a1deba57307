"""Which candidates of a contrastive batch are right answers, and must not count as negatives."""

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

    Right for a row are its query and the positives of every row of the batch that has the same query. A candidate that
    is right for a row, and is not its target, does not count for it. Texts may be given as any values (strings, tuples
    of token ids, ..), as long as the same text is an equal value.

    Args:
        queries: those of the B rows.
        candidates: M candidates.
        target: for each row the index of its positive among the candidates.
        other_positives: for each row its positives that are not among the candidates; empty if there are none.
        include_queries: the queries of the other rows are candidates, too.

    Returns:
        [B, M] bool, with `include_queries` [B, M + B], True where a candidate does not count; None if all count.
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
