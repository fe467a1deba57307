"""Hard rows: in forward the embedding of one token, in backward the gradient of the soft token that it stands for.

The straight-through estimator (Bengio et al., arXiv 1308.3432): nothing is known of the arg max but that the soft token
is near it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .vocab_parallel import VocabShard, gather_rows


def harden(
    out: Tensor, values: Tensor, argmax: Tensor, hard: Tensor | bool, embed_scale: float, shard: VocabShard | None
) -> Tensor:
    """``embed_scale * values[argmax]`` where ``hard``, in value; ``out`` elsewhere, and in gradient everywhere.

    Args:
        out: soft tokens [..., E].
        values: embedding matrix [V, E], or this rank's shard of it.
        argmax: [...] int64, index into the whole vocabulary.
        hard: a bool for all rows, or a bool tensor broadcastable to argmax.
    """
    values = values.detach()
    rows = values[argmax] if shard is None else gather_rows(values, argmax, shard)
    wide = torch.promote_types(rows.dtype, torch.float32)
    # out - out.detach() is 0 (not a number where the row is not), whose gradient is out's: the value stays exact
    rows = (rows.to(wide) * embed_scale).to(out.dtype) + (out - out.detach())
    return rows if hard is True else torch.where(torch.as_tensor(hard, device=out.device)[..., None], rows, out)
