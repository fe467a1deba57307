"""``soft_embed``: the convex combination of all input embeddings that a language-model head's softmax describes."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from gircse.integers import as_integer

from . import soft_embed_op
from .arguments import check_flag, check_floating, check_like, check_number, has_no_values, row_values
from .autocast import autocast_dtype
from .backends import check_backend
from .truncation import check_truncation, row_thresholds
from .vocab_parallel import VocabShard, group_name


class SoftTokenStats(NamedTuple):
    """Diagnostics of the soft tokens, each shaped ``hidden.shape[:-1]``; float32 (float64 for float64 inputs).

    All are those of the distribution that makes the soft token: truncated, renormalised, with noise where there is any.

    ``lse`` and ``entropy`` are differentiable, ``max_prob`` and ``argmax`` are not.
    """

    lse: Tensor  # logsumexp of the scores (of those that are kept), in nats
    entropy: Tensor  # of the probabilities, in nats: 0 (one-hot) to log V (uniform)
    max_prob: Tensor  # the largest probability
    argmax: Tensor  # its vocabulary index, int64; the lowest one of a tie


@overload
def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    embed_scale: float = ...,
    top_k: int | Tensor | None = ...,
    top_p: float | Tensor | None = ...,
    min_p: float | Tensor | None = ...,
    gumbel_seed: int | Tensor | None = ...,
    gumbel_temperature: float | Tensor | None = ...,
    hard: bool | Tensor = ...,
    vocab_parallel: VocabShard | None = ...,
    return_stats: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    embed_scale: float = ...,
    top_k: int | Tensor | None = ...,
    top_p: float | Tensor | None = ...,
    min_p: float | Tensor | None = ...,
    gumbel_seed: int | Tensor | None = ...,
    gumbel_temperature: float | Tensor | None = ...,
    hard: bool | Tensor = ...,
    vocab_parallel: VocabShard | None = ...,
    return_stats: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, SoftTokenStats]: ...


@overload
def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    embed_scale: float = ...,
    top_k: int | Tensor | None = ...,
    top_p: float | Tensor | None = ...,
    min_p: float | Tensor | None = ...,
    gumbel_seed: int | Tensor | None = ...,
    gumbel_temperature: float | Tensor | None = ...,
    hard: bool | Tensor = ...,
    vocab_parallel: VocabShard | None = ...,
    return_stats: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, SoftTokenStats]: ...


def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    embed_scale: float = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    gumbel_seed: int | Tensor | None = None,
    gumbel_temperature: float | Tensor | None = None,
    hard: bool | Tensor = False,
    vocab_parallel: VocabShard | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SoftTokenStats]:
    """Soft tokens (GIRCSE, arXiv 2509.24291; docs/method.md §3)::

        logits = logit_scale * (hidden @ head_weight.T + bias)
        if softcap is not None: logits = softcap * tanh(logits / softcap)
        scores = logits / temperature, with -inf where top_k, top_p or min_p remove an entry
        if gumbel_seed is not None: scores += standard Gumbel noise / temperature, or, with gumbel_temperature,
                                    scores = (scores + standard Gumbel noise) / gumbel_temperature
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

    A tensor with a value for each row may leave out dimensions of size 1: [B] fits hidden [B, 1, D].

    Args:
        hidden: [..., D], float32, float64, bfloat16 or float16. A row with NaN or inf spoils that row of the result
            only.
        head_weight: [V, D], same dtype and device as hidden. Entries of -inf belong into ``bias``, not here. Any
            strides, as for all matrices; rows that are contiguous and aligned to 16 bytes are fastest.
        embed_weight: [V, E], same dtype and device; None, or the same tensor as head_weight, means a tied matrix,
            whose gradient is the sum of both uses.
        bias: [V], same dtype and device; -inf removes an entry (unless soft-capped).
        temperature: > 0, a number or a floating-point tensor broadcastable to ``hidden.shape[:-1]``, differentiable.
            The values of a CUDA tensor are not checked, which would stall the device.
        softcap: > 0 or None; applied before the temperature (Gemma 2's ``final_logit_softcapping``).
        logit_scale: factor of the logits, bias included, before the soft-cap.
        embed_scale: factor of the result, the one that the model's own embedding layer applies (Gemma: sqrt(D)).
        top_k: keep the k highest scores of a row; an int, or an integer tensor broadcastable to
            ``hidden.shape[:-1]``. 0, as in transformers, and V or more keep everything.
        top_p: keep the fewest entries, highest first, whose probabilities sum to at least this; above 0 and at most 1,
            a number or a floating-point tensor of that shape.
        min_p: keep entries of at least this fraction of the highest probability; between 0 and 1, likewise.
            The three are applied in this order, as in transformers' generation, to the scores without noise; what is
            kept is renormalised, and gradients flow through it (the choice itself has none). Entries of equal score
            stay or go together, so that a tie may keep more (`gircse.ops.truncation`, also for the last digit). They
            cost a further pass over head_weight for every block of rows.
        gumbel_seed: None, an int64 number, or an int64 tensor broadcastable to ``hidden.shape[:-1]`` with a seed for
            each row. A row's noise depends on its seed and the vocabulary index alone, not on its place in the batch:
            rows with the same seed, and all rows of a call with a number, get the same noise. So does every further
            call with the same seed: in a loop pass ``step``, or ``torch.arange(rows) + rows * step`` for noise that no
            other row or step gets. Statistics and gradients are those of the noisy distribution.
        gumbel_temperature: None: ``temperature`` is that of the relaxation too, as in
            ``torch.nn.functional.gumbel_softmax(logits, tau=temperature)``. Otherwise > 0, a number or a tensor as for
            temperature: ``temperature`` shapes the distribution that is drawn from, this one relaxes the draw
            (Soft-Thinking's ``gumbel_softmax_temperature``). temperature must then be a number.
        hard: a bool for all rows, or a bool tensor broadcastable to ``hidden.shape[:-1]``: these rows become the
            embedding of their one highest score (with noise: a sampled token), with the gradient of the soft token
            towards every argument (straight-through). Statistics stay those of the soft token.
        vocab_parallel: the matrices (and bias) are this rank's `VocabShard` of the vocabulary; every rank of its group
            must make the same call with the same hidden. The result is that of the whole vocabulary, on every rank;
            backward needs the same upstream gradient on every rank (as it is when all compute the same loss).
        return_stats: also return a `SoftTokenStats`, from the same pass.
        backend: None (choose: triton on CUDA from compute capability 8.0 on, else torch), "torch" or "triton".
            "triton" takes CPU tensors if TRITON_INTERPRET=1 was set before.

    Under ``torch.autocast`` all tensors but float64 ones are cast to the autocast dtype first, as for a linear layer;
    for backward the originals are kept and cast again, so that many calls keep no copy of a matrix.

    Returns:
        [..., E] in hidden's dtype (under autocast: the autocast dtype); with ``return_stats`` a pair of it and the
        statistics.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a DTensor. ValueError: of the wrong rank, shape, device
        or value. RuntimeError: the backend is not available.
    """
    cast = autocast_dtype(hidden)
    options = check_scores(hidden, head_weight, bias, temperature, softcap, logit_scale, cast)
    if type(embed_scale) is not float or embed_scale != 1.0:
        options = options._replace(embed_scale=check_number("embed_scale", embed_scale))
    if embed_weight is not None:
        _check_embed(embed_weight, head_weight, cast)
        if embed_weight is head_weight:
            embed_weight = None
    group = None
    if vocab_parallel is not None:
        group = _check_shard(vocab_parallel, head_weight)
        options = options._replace(vocab_start=vocab_parallel.start)
    check_backend(backend)
    check_flag("return_stats", return_stats)
    leading = hidden.shape[:-1]
    inputs = Inputs(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        head_weight,
        embed_weight,
        bias,
        row_temperature(temperature, hidden),
        hard=_check_hard(hard, hidden),
    )
    if gumbel_seed is not None:
        seed, seeds = _check_seed(gumbel_seed, hidden)
        inputs, options = inputs._replace(seeds=seeds), options._replace(seed=seed)
    if top_k is not None or top_p is not None or min_p is not None:
        rules = check_truncation(hidden, top_k, top_p, min_p)
        if any(rule is not None for rule in rules):  # not for top_k=0 alone
            threshold = row_thresholds(inputs, options, rules, group=group, cast=cast, backend=backend)
            inputs = inputs._replace(threshold=threshold)
    if gumbel_temperature is not None:
        inputs, options = _relax(inputs, options, hidden, gumbel_temperature)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    call = soft_embed_op.Call(options, group, return_stats, differentiable, cast=cast, backend=backend)
    found = soft_embed_op.run(inputs, call)
    result = found.out if hidden.dim() == 2 else found.out.reshape(*leading, found.out.shape[-1])
    if not return_stats:
        return result
    statistics = (found.lse, found.entropy, found.max_prob, found.argmax)
    return result, SoftTokenStats(*(stat.reshape(leading) for stat in statistics))  # type: ignore[union-attr]


def check_scores(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    cast: torch.dtype | None = None,
) -> Options:
    """Check the arguments that define the scores (shared by all ops over a vocabulary) and collect the scalar ones.

    Under autocast, ``cast``, what is cast to one dtype may come in several.
    """
    check_floating("hidden", hidden)
    check_floating("head_weight", head_weight)
    if hidden.dim() < 1:
        raise ValueError("hidden: got a 0-dimensional tensor, expected [..., D]")
    if head_weight.dim() != 2:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}, expected [V, D]")
    if 0 in head_weight.shape:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}, expected V and D of at least 1")
    if hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, expected a last dimension of {head_weight.shape[1]}, "
            f"the D of head_weight {tuple(head_weight.shape)}"
        )
    check_like("head_weight", head_weight, "hidden", hidden, cast)
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != head_weight.shape[:1]:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}, expected ({head_weight.shape[0]},), "
                "one entry for each row of head_weight"
            )
        check_like("bias", bias, "hidden", hidden, cast)
    if softcap is not None:
        softcap = check_number("softcap", softcap, positive=True)
    logit_scale = check_number("logit_scale", logit_scale)
    if isinstance(temperature, Tensor):
        _check_temperature("temperature", temperature, hidden)
        return Options(softcap=softcap, logit_scale=logit_scale)
    return Options(check_number("temperature", temperature, positive=True), softcap, logit_scale)


def row_temperature(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    """A tensor temperature as one value for each row, [T]; None for a number."""
    return row_values("temperature", temperature, hidden) if isinstance(temperature, Tensor) else None


def _check_seed(seed: object, hidden: Tensor) -> tuple[int | None, Tensor | None]:
    """A seed for all rows, or one for each, [T]."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"gumbel_seed: got dtype {seed.dtype}, expected torch.int64")
        return None, row_values("gumbel_seed", seed, hidden)
    number = as_integer(seed)
    if number is None:
        raise TypeError(f"gumbel_seed: got {type(seed).__name__}, expected an int or an int64 tensor")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"gumbel_seed: got {number}, expected a number of 64 bits, -2**63 to 2**63 - 1")
    return number, None


def _relax(
    inputs: Inputs, options: Options, hidden: Tensor, gumbel_temperature: float | Tensor
) -> tuple[Inputs, Options]:
    """The temperature moves before the noise, and the Gumbel temperature takes its place behind it."""
    if options.seed is None and inputs.seeds is None:
        raise ValueError("gumbel_temperature: got one without gumbel_seed, expected both")
    if inputs.temperature is not None:
        raise TypeError("temperature: got a tensor, expected a number where gumbel_temperature is given")
    options = options._replace(logit_temperature=options.temperature, temperature=1.0)
    divisor: float | Tensor
    if isinstance(gumbel_temperature, Tensor):
        _check_temperature("gumbel_temperature", gumbel_temperature, hidden)
        rows = row_values("gumbel_temperature", gumbel_temperature, hidden)
        inputs = inputs._replace(temperature=rows)
        divisor = rows.detach()
    else:
        divisor = check_number("gumbel_temperature", gumbel_temperature, positive=True)
        options = options._replace(temperature=divisor)
    if inputs.threshold is not None:  # in units of the scores
        inputs = inputs._replace(threshold=(inputs.threshold / divisor).to(inputs.threshold.dtype))
    return inputs, options


def _check_hard(hard: object, hidden: Tensor) -> Tensor | None:
    """One bool for each row, [T]; None: no row is hard."""
    if isinstance(hard, Tensor):
        if hard.dtype != torch.bool:
            raise TypeError(f"hard: got dtype {hard.dtype}, expected torch.bool")
        return row_values("hard", hard, hidden)
    if not isinstance(hard, bool):
        raise TypeError(f"hard: got {type(hard).__name__}, expected a bool or a bool tensor")
    return torch.ones(hidden.shape[:-1].numel(), dtype=torch.bool, device=hidden.device) if hard else None


def _check_shard(shard: object, head_weight: Tensor) -> str:
    """The name of the shard's process group."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"vocab_parallel: got {type(shard).__name__}, expected a VocabShard")
    if shard.stop - shard.start != head_weight.shape[0]:
        raise ValueError(
            f"head_weight: got {head_weight.shape[0]} rows, expected {shard.stop - shard.start}, "
            f"those of vocab_parallel from {shard.start} to {shard.stop}"
        )
    return group_name(shard)


def _check_embed(embed_weight: Tensor, head_weight: Tensor, cast: torch.dtype | None) -> None:
    check_floating("embed_weight", embed_weight)
    if embed_weight.dim() != 2 or embed_weight.shape[0] != head_weight.shape[0] or embed_weight.shape[1] == 0:
        raise ValueError(
            f"embed_weight: got shape {tuple(embed_weight.shape)}, expected [{head_weight.shape[0]}, E] "
            f"with E of at least 1, one row for each of head_weight {tuple(head_weight.shape)}"
        )
    check_like("embed_weight", embed_weight, "head_weight", head_weight, cast)


def _check_temperature(name: str, temperature: Tensor, hidden: Tensor) -> None:
    check_floating(name, temperature)
    row_values(name, temperature, hidden)
    # On an accelerator the comparison would wait for the device; a compiler has no values.
    if temperature.device.type == "cpu" and not has_no_values(temperature) and not bool((temperature > 0).all()):
        raise ValueError(f"{name}: got {temperature.detach().min().item()}, expected values above 0")
