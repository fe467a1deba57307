"""What rules keep where that is little: the highest entries of each row, and the rules among them, in plain PyTorch.

The candidates are in descending order, so that every rule keeps the first few of them.
"""

from __future__ import annotations

import torch
from gircse_kernels.contract import Candidates, Selection, Truncation
from torch import Tensor

from .soft_embed_torch import LOG_FLOOR
from .thresholds_torch import between
from .vocab_parallel import Across


def highest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ids and scores [R, size] of the highest of scores [R, V], the lower id first among equals.

    Behind the V entries that there are, and in place of those of -inf, comes the first one's id with a score of -inf.
    """
    num_rows, num_vocab = scores.shape
    if not num_vocab:  # a shard without entries
        return scores.new_zeros((num_rows, size), dtype=torch.int64), scores.new_full((num_rows, size), -torch.inf)
    best = scores.topk(min(size, num_vocab), dim=1)
    ids, found = in_order(best.indices, best.values)
    ids = torch.where(found == -torch.inf, ids[:, :1], ids)
    more = max(0, size - num_vocab)
    return (
        torch.cat([ids, ids[:, :1].expand(-1, more)], 1),
        torch.nn.functional.pad(found, (0, more), value=-torch.inf),
    )


def in_order(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by descending score, the lower id first among equals; both [R, C]."""
    order = ids.argsort(1)
    order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    return ids.gather(1, order), scores.gather(1, order)


def distribution(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peak, total and moment [R] of the softmax of scores [R, V], and the index of the peak."""
    if not scores.shape[1]:  # a shard without entries
        empty = scores.new_zeros(len(scores))
        return empty + torch.finfo(scores.dtype).min, empty, empty, empty.long()
    peak, argmax = scores.max(1)
    peak = peak.clamp_min(torch.finfo(scores.dtype).min)
    logs = scores - peak[:, None]
    weights = logs.exp()
    return peak, weights.sum(1), weights.mul_(logs.clamp_min_(LOG_FLOOR)).sum(1), argmax


def merge(found: Candidates, across: Across) -> Candidates:
    """The candidates of the whole vocabulary from those of this rank's shard, whose ids are those of the whole."""
    size = found.ids.shape[1]
    ids, scores = in_order(across.gather(found.ids), across.gather(found.scores))
    peak = across.max(found.peak.clone())
    shift = (found.peak - peak).clamp_min(LOG_FLOOR)
    decay = shift.exp()
    moment = across.sum((found.moment + shift * found.total) * decay)
    none = torch.iinfo(torch.int64).max
    argmax = across.min(torch.where(found.peak == peak, found.argmax, none))
    argmax = torch.where(argmax == none, 0, argmax)  # a row of NaN: any index
    return Candidates(ids[:, :size], scores[:, :size], peak, across.sum(found.total * decay), moment, argmax)


def keep(found: Candidates, rules: Truncation) -> Selection:
    """What the rules keep of the candidates of whole rows. Rows whose `num_kept` reaches their number are not right."""
    scores, peak = found.scores, found.peak[:, None]
    top_k, top_p, min_p, top_n = (None if rule is None else rule[:, None] for rule in rules)
    there = scores.isfinite()
    limit = top_n if top_k is None else top_k
    assert limit is not None
    kept = there & (scores >= _last_of(scores, limit))
    num_kept = kept.sum(1)
    if top_p is not None:
        weights = torch.where(kept, scores - peak, -torch.inf).exp()
        total = found.total[:, None] if top_k is None else weights.sum(1, keepdim=True)
        first = torch.ones_like(kept)
        first[:, 1:] = scores[:, 1:] != scores[:, :-1]
        # the probability strictly above, which entries of one score share
        above = torch.where(first, weights.cumsum(1) - weights, 0).cummax(1).values
        kept &= (above < top_p * total) | (top_p >= 1)
    if min_p is not None:
        kept &= scores >= peak + min_p.log()
    if top_n is not None:
        kept &= scores >= _last_of(scores, top_n)
    number = kept.sum(1, keepdim=True)
    places = number.clamp(1, scores.shape[1] - 1)
    last, following = scores.gather(1, places - 1)[:, 0], scores.gather(1, places)[:, 0]
    threshold = between(last, following, found.peak, found.peak.abs().maximum(following.abs().nan_to_num(posinf=0)))
    scores = scores.masked_fill(~kept, -torch.inf)
    lost = ~(peak < torch.inf)  # NaN or infinite: the softmax of such a row is NaN, and no tie of it matters
    num_kept = num_kept.masked_fill(lost[:, 0], 0)
    return Selection(threshold, *statistics(found), found.ids, scores.masked_fill(lost, torch.nan), num_kept)


def _last_of(scores: Tensor, limit: Tensor) -> Tensor:
    """The limit-th score [T, 1] of scores [T, C] in descending order, or the last one."""
    return scores.gather(1, limit.clamp_max(scores.shape[1]) - 1)


def statistics(found: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp, entropy, largest probability and its index, [T], of the whole distribution."""
    log_total = found.total.log()
    return found.peak + log_total, log_total - found.moment / found.total, found.total.reciprocal(), found.argmax
