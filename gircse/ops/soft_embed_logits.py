"""``soft_embed_logits``: soft tokens of logits that the caller has already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .arguments import check_flag
from .soft_embed import SoftEmbedOptions, SoftTokenStats, compute
from .soft_embed_arguments import prepare

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def soft_embed_logits(
    logits: Tensor, embed_weight: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[SoftEmbedOptions]
) -> Tensor: ...


@overload
def soft_embed_logits(
    logits: Tensor, embed_weight: Tensor, *, return_stats: Literal[True], **options: Unpack[SoftEmbedOptions]
) -> tuple[Tensor, SoftTokenStats]: ...


@overload
def soft_embed_logits(
    logits: Tensor, embed_weight: Tensor, *, return_stats: bool, **options: Unpack[SoftEmbedOptions]
) -> Tensor | tuple[Tensor, SoftTokenStats]: ...


def soft_embed_logits(
    logits: Tensor, embed_weight: Tensor, *, return_stats: bool = False, **options: Unpack[SoftEmbedOptions]
) -> Tensor | tuple[Tensor, SoftTokenStats]:
    """`soft_embed` of logits that are there already: ``softmax((logits + g) / temperature) @ embed_weight``.

    All options, statistics, gradients, transforms and promises are those of `soft_embed`, with ``logits`` in the place
    of ``hidden @ head_weight.T``. Of the size of the logits there are only they and their gradient, which is written
    once: they are read where they lie, in any strides and leading dimensions, never written to, and kept for backward
    as they are; temporaries are at most 64 MiB plus O(T * E). Derivatives of the gradient copy a block of rows.

    Args:
        logits: [..., V], float32, float64, bfloat16 or float16; -inf removes an entry (unless soft-capped), and a row
            of nothing else gives NaN in that row alone. Under ``torch.autocast`` they keep their dtype.
        embed_weight: [V, E], same device; any of these dtypes, but float64 only with float64.
        return_stats, options: as for `soft_embed`. With ``vocab_parallel`` the logits and embed_weight are those of
            this rank's shard, and so is the gradient of the logits.

    Returns:
        [..., E] in embed_weight's dtype (or ``out_dtype``; under autocast in its dtype); with ``return_stats`` a pair
        of it and the statistics, each shaped ``logits.shape[:-1]``.

    Raises:
        TypeError, ValueError, RuntimeError: as `soft_embed`.
    """
    check_flag("return_stats", return_stats)
    call = prepare(logits, None, embed_weight, **options)
    return compute(call, logits.shape[:-1], return_stats)
