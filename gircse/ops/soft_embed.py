"""``soft_embed``: the convex combination of all input embeddings that a language-model head's softmax describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from . import soft_embed_op
from .arguments import check_flag
from .selection import narrow
from .soft_embed_arguments import Prepared, prepare
from .vocab_parallel import VocabShard

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FullStats(NamedTuple):
    """The statistics of `SoftTokenStats`, of ``softmax(logits / temperature)`` before rules and noise."""

    lse: Tensor
    entropy: Tensor
    max_prob: Tensor
    argmax: Tensor


class SoftTokenStats(NamedTuple):
    """Diagnostics of the soft tokens, each shaped ``hidden.shape[:-1]``; float32 (float64 for float64 inputs).

    The first four are those of the distribution that makes the soft token: truncated, renormalised, with noise where
    there is any. ``full`` has them of the whole one, before rules and noise; without either it holds the same tensors,
    otherwise tensors that are not differentiable.

    ``lse`` and ``entropy`` are differentiable, ``max_prob`` and ``argmax`` are not.
    """

    lse: Tensor  # logsumexp of the scores (of those that are kept), in nats
    entropy: Tensor  # of the probabilities, in nats: 0 (one-hot) to log V (uniform)
    max_prob: Tensor  # the largest probability
    argmax: Tensor  # its vocabulary index, int64; the lowest one of a tie
    full: FullStats


class SoftEmbedOptions(TypedDict, total=False):
    """The keyword arguments of `soft_embed` but ``return_stats``, for type checkers."""

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float | Tensor
    embed_scale: float | Tensor
    token_bitmask: Tensor | None
    logit_bias: tuple[Tensor, Tensor] | None
    top_k: int | Tensor | None
    top_p: float | Tensor | None
    min_p: float | Tensor | None
    top_n: int | Tensor | None
    gumbel_seed: int | Tensor | None
    gumbel_temperature: float | Tensor | None
    noise_scale: float | Tensor
    hard: bool | Tensor
    vocab_parallel: VocabShard | None
    out_dtype: torch.dtype | None
    backend: str | None


@overload
def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[SoftEmbedOptions],
) -> Tensor: ...


@overload
def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[SoftEmbedOptions],
) -> tuple[Tensor, SoftTokenStats]: ...


@overload
def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = ...,
    *,
    return_stats: bool,
    **options: Unpack[SoftEmbedOptions],
) -> Tensor | tuple[Tensor, SoftTokenStats]: ...


def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    embed_scale: float | Tensor = 1.0,
    token_bitmask: Tensor | None = None,
    logit_bias: tuple[Tensor, Tensor] | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_n: int | Tensor | None = None,
    gumbel_seed: int | Tensor | None = None,
    gumbel_temperature: float | Tensor | None = None,
    noise_scale: float | Tensor = 1.0,
    hard: bool | Tensor = False,
    vocab_parallel: VocabShard | None = None,
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SoftTokenStats]:
    """Soft tokens (GIRCSE, arXiv 2509.24291; docs/method.md §3)::

        logits = logit_scale * (hidden @ head_weight.T + bias)
        if softcap is not None: logits = softcap * tanh(logits / softcap)
        if logit_bias is not None: logits[t, ids[t]] += values[t]; where a bit of token_bitmask is 0: logits = -inf
        scores = logits / temperature, with -inf where top_k, top_p, min_p or top_n remove an entry
        if gumbel_seed is not None: scores += noise_scale * standard Gumbel noise / temperature, or, with
            gumbel_temperature, scores = (scores + noise_scale * standard Gumbel noise) / gumbel_temperature
        out = embed_scale * softmax(scores) @ embed_weight

    Exact and dense, yet nothing of size [T, V] (T = rows of hidden) exists beyond a fixed budget in forward or
    backward: temporaries are at most 64 MiB plus O(T * (D + E)). Where a gradient is wanted and all probabilities of a
    call fit another 64 MiB, the kernels keep them for backward instead of computing them again. Scores, softmax and
    sums are float32 (float64 for float64 inputs) whatever the input dtype, except that the kernels may round the scores
    of many bfloat16 rows to bfloat16, as PyTorch's own product does, where neither statistics nor a truncation need
    them; float32 products are never rounded to TF32 by the kernels, while the torch backend on CUDA follows PyTorch's
    process-wide setting, off by default. Gradients exist for every floating-point tensor argument, come in their
    input's dtype, and those that nobody asks for are not computed. Two runs give bitwise the same. The result may be
    changed in place.

    Derivatives of the gradient (``create_graph=True`` and a second backward, `torch.func.grad` of grad, `hessian`,
    gradient penalties), and forward-mode ones, are those of the plain formula, by PyTorch's own operators: right to any
    order, but slow, and with [rows, V] tensors for a block of rows at a time. RuntimeError where there is none: of a
    vocabulary in shards, of `torch.compile`, of forward mode inside forward mode.

    Works under ``torch.compile(fullgraph=True)``, where new temperatures need no new graph, `torch.export`,
    `torch.func`, activation checkpointing and hooks on saved tensors, and inside a captured CUDA graph, which replays
    an int ``gumbel_seed`` unchanged: capture with a tensor and write new seeds into it.

    A tensor *by row* has one value for each row: it is broadcastable to ``hidden.shape[:-1]`` ([B] also fits hidden
    [B, 1, D]), or to the logits with a last dimension of 1 ([B, 1] fits hidden [B, D]). The values of a CUDA tensor
    are not checked, which would stall the device.

    Args:
        hidden: [..., D], float32, float64, bfloat16 or float16. A row with NaN or inf spoils that row of the result
            only.
        head_weight: [V, D], same dtype and device as hidden. Entries of -inf belong into ``bias``, not here. Any
            strides, as for all matrices; rows that are contiguous and aligned to 16 bytes are fastest.
        embed_weight: [V, E], same device, of any dtype beside hidden's (float64 only beside float64); None, or the same
            tensor as head_weight, means a tied matrix, whose gradient is the sum of both uses.
        bias: [V], likewise; -inf removes an entry (unless soft-capped).
        temperature: > 0, a number or a floating-point tensor by row.
        softcap: > 0; None or 0: none (Gemma 2's ``final_logit_softcapping``).
        logit_scale: factor of the logits, bias included, before the soft-cap; a number or a floating-point tensor of
            one element (not 0).
        embed_scale: factor of the result, the one that the model's own embedding layer applies (Gemma: sqrt(D)); a
            number or a floating-point tensor of one element.
        token_bitmask: [T, ceil(V / 32)] int32, as libraries for structured generation pack it: entry v is bit v % 32 of
            word v // 32, and 0 removes it, also under a soft-cap. Leading dimensions broadcast to those of hidden.
        logit_bias: a pair of ids [T, m], int64 or int32, and values [T, m], floating point; their leading dimensions
            broadcast likewise. The values are added to the logits of these entries of a row, after the soft-cap, as a
            logits processor would, twice where an id comes twice. An id of -1 is none. For repetition penalties, say.
        top_k: keep the k highest scores of a row; an int, or an integer tensor by row. 0 and -1, as elsewhere, and V or
            more keep everything.
        top_p: keep the fewest entries, highest first, whose probabilities sum to at least this; above 0 and at most 1,
            a number or a floating-point tensor by row.
        min_p: keep entries of at least this fraction of the highest probability; between 0 and 1, likewise.
        top_n: keep the n highest of what the three before it keep; as top_k.
            The rules are applied in this order, as in transformers' generation, to the scores without noise; what is
            kept is renormalised, and gradients flow through it (the choice itself has none). Entries of equal score
            stay or go together, so that a tie may keep more (`gircse.ops.truncation`, also for the last digit). Where
            top_k (or, without it, top_n) is at most 256, as a number or a tensor on the CPU, one pass over head_weight
            finds what is kept, and all else reads and differentiates the kept rows alone. Otherwise, and where a tie
            goes far beyond k, the rules cost a further pass over head_weight for every block of rows.
        gumbel_seed: None, an int64 number, or an int64 or int32 tensor by row. A row's noise depends on its seed and
            the vocabulary index alone, not on its place in the batch: rows with the same seed, and all rows of a call
            with a number, get the same noise. So does every further call with the same seed: in a loop pass ``step``,
            or ``torch.arange(rows) + rows * step`` for noise that no other row or step gets. Statistics and gradients
            are those of the noisy distribution.
        gumbel_temperature: None: ``temperature`` is that of the relaxation alone, as in
            ``torch.nn.functional.gumbel_softmax(logits, tau=temperature)``: the highest score is a draw from
            softmax(logits), whatever the temperature. Otherwise > 0, a number or a floating-point tensor by row: this
            one relaxes the draw, and ``temperature`` shapes the distribution softmax(logits / temperature) that is
            drawn from (Soft-Thinking's ``gumbel_softmax_temperature``). To sample tokens at temperature T pass
            ``temperature=T, gumbel_temperature=1.0, hard=True``.
        noise_scale: factor of the noise, at least 0, a number or a floating-point tensor by row. 0 in a row means no
            noise there, so that one call serves rows that sample and rows that do not; ``gumbel_temperature`` divides
            the scores of these rows all the same.
        hard: a bool for all rows, or a bool tensor by row: these rows become the embedding of their one highest score
            (with noise: a sampled token). Straight-through, as ``torch.nn.functional.gumbel_softmax(hard=True) @ E``:
            of embed_weight the chosen row gets the gradient, every other argument gets that of the soft token.
            Statistics stay those of the soft token.
        vocab_parallel: the matrices (and bias) are this rank's `VocabShard` of the vocabulary, possibly of no rows;
            every rank of its group must make the same call with the same hidden, and with token_bitmask and logit_bias
            of the whole vocabulary. The result is that of the whole vocabulary, on every rank; backward needs the same
            upstream gradient on every rank (as it is when all compute the same loss).
        out_dtype: of the result, for example float32 beside bfloat16 inputs, without a rounding in between; None: that
            of hidden.
        return_stats: also return a `SoftTokenStats`, from the same pass.
        backend: None (choose: triton on CUDA from compute capability 8.0 on, else torch), "torch" or "triton".
            "triton" takes CPU tensors if TRITON_INTERPRET=1 was set before.

    Under ``torch.autocast`` all tensors but float64 ones are cast to the autocast dtype first, as for a linear layer;
    for backward the originals are kept and cast again, so that many calls keep no copy of a matrix.

    Returns:
        [..., E] in ``out_dtype``, else in hidden's dtype (under autocast: the autocast dtype); with ``return_stats`` a
        pair of it and the statistics.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a DTensor. ValueError: of the wrong rank, shape, device
        or value. RuntimeError: the backend is not available.
    """
    check_flag("return_stats", return_stats)
    call = prepare(
        hidden,
        head_weight,
        embed_weight,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        embed_scale=embed_scale,
        token_bitmask=token_bitmask,
        logit_bias=logit_bias,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        top_n=top_n,
        gumbel_seed=gumbel_seed,
        gumbel_temperature=gumbel_temperature,
        noise_scale=noise_scale,
        hard=hard,
        vocab_parallel=vocab_parallel,
        out_dtype=out_dtype,
        backend=backend,
    )
    return compute(call, hidden.shape[:-1], return_stats)


def compute(call: Prepared, leading: torch.Size, return_stats: bool) -> Tensor | tuple[Tensor, SoftTokenStats]:
    """The soft tokens [*leading, E] of a checked call, and with ``return_stats`` their statistics."""
    inputs, options, full = narrow(call, stats=return_stats)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    found = soft_embed_op.run(
        inputs,
        soft_embed_op.Call(
            options,
            call.group,
            stats=return_stats,
            exact=differentiable,
            cast=call.cast,
            out_dtype=call.op_dtype,
            backend=call.backend,
        ),
    )
    result = found.out if len(leading) == 1 else found.out.reshape(*leading, found.out.shape[-1])
    if call.embed_scale is not None:
        result = (result * call.embed_scale).to(call.out_dtype)
    if not return_stats:
        return result
    own: Any = (found.lse, found.entropy, found.max_prob, found.argmax)
    own, whole = (tuple(stat.reshape(leading) for stat in stats) for stats in (own, full or own))
    return result, SoftTokenStats(own[0], own[1], own[2], own[3], FullStats(*whole))
