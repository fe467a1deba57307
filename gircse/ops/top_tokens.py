"""``top_tokens``: the most probable vocabulary entries of a soft token, for inspection and for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gircse_kernels.contract import Candidates, Inputs, Options
from torch import Tensor

from gircse.integers import as_integer

from . import kept_rows, soft_embed_op
from .autocast import no_autocast
from .backends import resolve_backend
from .candidates_torch import in_order, merge
from .chunk_scores import chunk_scores, ordered_bits
from .selection import narrow
from .soft_embed_arguments import prepare
from .soft_embed_plain import entry_scores
from .tiles_torch import accumulation_dtype, slices, tiling
from .transforms import eager, rows_of_numbers, rows_or_loop
from .vocab_parallel import Across, SumGradient, VocabShard, find_group

_NUM_TENSORS = len(Inputs._fields)
_MATRICES = (1, 2, 3)  # what all rows share
_WITH_ROWS = ("hidden", "temperature", "noise_scale", "bias_values")  # and a gradient


def top_tokens(
    hidden: Tensor,
    head_weight: Tensor,
    n: int,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    token_bitmask: Tensor | None = None,
    logit_bias: tuple[Tensor, Tensor] | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_n: int | Tensor | None = None,
    gumbel_seed: int | Tensor | None = None,
    gumbel_temperature: float | Tensor | None = None,
    noise_scale: float | Tensor = 1.0,
    vocab_parallel: VocabShard | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The n entries of a soft token that have the largest weights: ``out = sum of weights * embed_weight[ids]`` of
    `soft_embed` with the same options, where n is as many as it keeps.

    Without rules and noise these are the n most probable entries, with their probabilities in the full softmax, which
    are not differentiable. With rules the weights are the probabilities among what they keep, 0 behind it (the ids
    there are valid and mean nothing). With ``gumbel_seed`` the entries are those of the n highest noisy scores: a
    sample without replacement (Kool et al., arXiv 1903.06059) of what the rules keep, or of everything. Both are
    differentiable in the weights.

    Exact and deterministic: of equal scores the lower index comes first. No tensor of size [T, V] is made; the gradient
    of the weights holds one of [T, n, D].

    Args:
        hidden: [..., D], floating point. Rows with NaN give NaN weights and arbitrary valid ids.
        head_weight: [V, D], same dtype and device.
        n: 1 to V.
        The others: as for `soft_embed`. Autocast changes nothing.

    Returns:
        ids [..., n], int64, in the whole vocabulary, and weights [..., n], float32 (float64 for float64 inputs), in
        descending order.

    Raises:
        As `soft_embed`; ValueError for n outside 1..V, TypeError if it is no int.
    """
    call = prepare(
        hidden,
        head_weight,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        token_bitmask=token_bitmask,
        logit_bias=logit_bias,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        top_n=top_n,
        gumbel_seed=gumbel_seed,
        gumbel_temperature=gumbel_temperature,
        noise_scale=noise_scale,
        vocab_parallel=vocab_parallel,
        backend=backend,
    )._replace(cast=None)
    if hidden.device.type == "meta":
        raise ValueError("hidden: got device meta, expected one with values")
    count = as_integer(n)
    if count is None:
        raise TypeError(f"n: got {type(n).__name__}, expected an int")
    num_vocab = head_weight.shape[0]
    if count < 1 or (count > num_vocab and call.group is None):
        raise ValueError(f"n: got {count}, expected 1 to {num_vocab}, the V of head_weight")
    inputs, options, _ = narrow(call, stats=False)
    ids, weights = _find(inputs, options, count, call.group, backend)
    if call.rules is not None or call.noise is not None:
        tensors = [t for t in inputs if t is not None and t.requires_grad]
        if tensors and torch.is_grad_enabled():
            weights = _differentiable(inputs, options, ids, weights, call.group, backend)
    leading = hidden.shape[:-1]
    return ids.reshape(*leading, count), weights.reshape(*leading, count)


def _differentiable(
    inputs: Inputs, options: Options, ids: Tensor, weights: Tensor, group: str | None, backend: str | None
) -> Tensor:
    """The same weights [T, n] as ``exp(score - lse)`` of differentiable scores and log-sum-exp."""
    call = soft_embed_op.Call(options, group, stats=True, exact=True, backend=backend)
    head = inputs.head
    assert head is not None
    lse = soft_embed_op.run(inputs._replace(embed=head[:, :1]), call).lse  # the least that can be mixed
    assert lse is not None
    local = ids - options.vocab_start
    counts = (local >= 0) & (local < inputs.num_vocab) & (weights != 0)
    if group is not None:  # each rank differentiates the scores of its own entries
        process_group = find_group(group)
        rows = {name: getattr(inputs, name) for name in _WITH_ROWS}
        rows = {name: t if t is None else SumGradient.apply(t, process_group) for name, t in rows.items()}
        inputs = inputs._replace(**rows)
        if not inputs.num_vocab:  # this rank has no entry, but its part of the sums
            inputs = inputs._replace(head=head.new_zeros(1, head.shape[1]), bias=None)
    scores = entry_scores(inputs, options, local.masked_fill(~counts, 0))
    if group is None:
        return torch.where(counts, (scores - lse[:, None]).exp(), weights)
    # the value is there already; of another rank's entry only the log-sum-exp has a gradient here
    change = torch.where(counts, scores - scores.detach(), 0.0) - (lse - lse.detach())[:, None]
    return torch.where(weights != 0, weights * change.exp(), weights)


def _find(inputs: Inputs, options: Options, n: int, group: str | None, backend: str | None) -> tuple[Tensor, Tensor]:
    detached: Any = (None if t is None else t.detach() for t in inputs)
    inputs = Inputs(*detached)
    if torch.compiler.is_compiling():
        inputs, options = rows_of_numbers(inputs, options)
    scalars = (
        *(n, options.temperature, options.softcap, options.logit_scale, options.seed),
        *(options.vocab_start, options.noise_scale, group, backend),
    )
    return (_run if eager(inputs, backend) else _op)(*inputs, *scalars)


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*arguments[:_NUM_TENSORS])
    n, temperature, softcap, logit_scale, seed, start, noise_scale, group, backend = arguments[_NUM_TENSORS:]
    options = Options(temperature, softcap, logit_scale, 1.0, seed, start, noise_scale)
    across = Across(None if group is None else find_group(group))
    backend = resolve_backend(backend, inputs.hidden)
    with no_autocast(inputs.hidden.device.type):
        if inputs.ids is not None and n <= inputs.ids.shape[1] and backend == "torch" and kept_rows.fits(inputs):
            scores = kept_rows.noisy_scores(inputs, options)
            ids, scores = in_order(inputs.ids, scores)
            peak = scores[:, 0].clamp_min(torch.finfo(scores.dtype).min)
            total = (scores - peak[:, None]).exp().sum(1)
        else:
            ids, scores, peak, total = _top(inputs, options, n, backend)
        nothing = torch.zeros_like(total)
        found = merge(Candidates(ids[:, :n] + start, scores[:, :n], peak, total, nothing, ids[:, 0]), across)
        return found.ids, (found.scores - found.peak[:, None]).exp_().div_(found.total[:, None])


def _top(inputs: Inputs, options: Options, n: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and scores [T, n] of the highest scores, the largest one and the sum of e^(score - largest) [T]."""
    num_rows, num_vocab = inputs.num_rows, inputs.num_vocab
    width = 0 if inputs.head is None else inputs.head.shape[1]
    dtype, device = accumulation_dtype(inputs.hidden.dtype), inputs.hidden.device
    ids = torch.zeros((num_rows, n), dtype=torch.int64, device=device)
    scores = torch.full((num_rows, n), -torch.inf, dtype=dtype, device=device)
    peak = torch.full((num_rows, 1), torch.finfo(dtype).min, dtype=dtype, device=device)
    total = torch.zeros((num_rows, 1), dtype=dtype, device=device)
    # Besides the scores a tile holds candidates, keys and ids of the chunk and of the n best so far: some eight words
    # each.
    tile, size = tiling(num_rows, num_vocab, tiles=10, per_vocab=width, per_row=10 * n, itemsize=dtype.itemsize)
    score = chunk_scores(inputs, options, size, backend)
    for vocab in slices(num_vocab, size):
        for rows in slices(num_rows, tile):
            found = score(rows, vocab)
            new_peak = torch.maximum(peak[rows], found.amax(1, keepdim=True))
            total[rows] *= (peak[rows] - new_peak).exp_()
            total[rows] += (found - new_peak).exp_().sum(1, keepdim=True)
            peak[rows] = new_peak
            # The best so far come first and have the lower ids: position breaks ties as the id does.
            seen = min(vocab.start, n)
            candidates = torch.cat([scores[rows, :seen], found], 1)
            keep = min(n, candidates.shape[1])
            best = _top_positions(candidates, keep)
            chunk_ids = torch.arange(vocab.start, vocab.stop, device=device).expand(found.shape)
            ids[rows, :keep] = torch.cat([ids[rows, :seen], chunk_ids], 1).gather(1, best)
            scores[rows, :keep] = candidates.gather(1, best)
    return ids, scores, peak[:, 0], total[:, 0]


def _top_positions(scores: Tensor, n: int) -> Tensor:
    """Positions of the n largest of each row, descending, the lower position first among equals."""
    if scores.dtype != torch.float32:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
    # topk leaves the order of ties open, and a stable sort of every chunk is slow: make the keys distinct instead
    ordered = ordered_bits(scores).to(torch.int64)
    last = scores.shape[1] - 1
    keys = (ordered << 32) | torch.arange(last, -1, -1, device=scores.device)
    return last - (keys.topk(n, dim=1).values & 0xFFFFFFFF)


_op = torch.library.custom_op(
    "gircse::top_tokens",
    _run,
    mutates_args=(),
    schema=f"({soft_embed_op.OP.tensors}, SymInt n, float scalar_temperature, float? softcap, float logit_scale, "
    "SymInt? seed, SymInt vocab_start, float scalar_noise_scale, str? group, str? backend) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, n = Inputs(*arguments[:_NUM_TENSORS]), arguments[_NUM_TENSORS]
    shape, hidden = (inputs.num_rows, n), inputs.hidden
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))


@_op.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    return rows_or_loop(_op, _MATRICES, _NUM_TENSORS, info.batch_size, in_dims, arguments)
