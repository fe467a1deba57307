"""Hard rows: the embedding of one token, with the gradients of ``F.gumbel_softmax(.., hard=True) @ embed_weight``.

The straight-through estimator (Bengio et al., arXiv 1308.3432) as PyTorch has it: with P the probabilities and y the
one-hot of the highest score, the row is ``(y + P - P.detach()) @ E``. Its value is that token's embedding, the gradient
of P is that of the soft token, because nothing is known of the arg max but that the soft token is near it, and the
gradient of E is y^T grad: it goes to the one row that was taken.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from gircse_kernels.contract import Forward, Inputs, Options
from torch import Tensor


def harden(found: Forward, inputs: Inputs, options: Options, group: object) -> Forward:
    """The forward's result with ``inputs.hard`` rows become embeddings: ``embed_scale * E[argmax]``, exactly.

    Args:
        found: of the whole vocabulary, with statistics; ``argmax`` is an index into it.
        group: the process group over whose ranks the vocabulary is divided; None: it is whole.
    """
    assert found.argmax is not None
    assert inputs.hard is not None
    values, token, out = inputs.values, found.argmax, found.out
    if group is None:
        rows = values[token]
    else:
        index = token - options.vocab_start
        mine = (index >= 0) & (index < values.shape[0])
        rows = values.new_zeros(len(token), values.shape[1])
        if values.shape[0]:
            rows = torch.where(mine[:, None], values[index.clamp(0, values.shape[0] - 1)], rows)
        dist.all_reduce(rows, group=group)
    rows = (rows.to(torch.promote_types(rows.dtype, torch.float32)) * options.embed_scale).to(out.dtype)
    # out - out is 0, and not a number where the soft token is not
    return found._replace(out=torch.where(inputs.hard[:, None], rows + (out - out), out))


def tokens(found: Forward, hard: Tensor | None) -> Tensor | None:
    """`Saved.token` of a forward; None: there are no hard rows."""
    return None if hard is None or found.argmax is None else torch.where(hard, found.argmax, -1)


def one_hot_rows(probs: Tensor, size: Tensor | float, token: Tensor, start: int) -> Tensor:
    """Of a tile of probabilities [R, C] what multiplies the embedding matrix: a hard row's is ``size`` times one-hot.

    Args:
        size: what stands for a probability of 1, a number or [R, 1].
        token: `Saved.token` of the rows, [R].
        start: index of the first column in the whole vocabulary.
    """
    columns = torch.arange(start, start + probs.shape[1], device=probs.device)
    return torch.where(token[:, None] < 0, probs, (token[:, None] == columns) * size)
