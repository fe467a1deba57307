"""``top_tokens``: the most probable vocabulary entries of a soft token, for inspection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from gircse.integers import as_integer

from .autocast import no_autocast
from .backends import resolve_backend
from .chunk_scores import chunk_scores, ordered_bits
from .soft_embed_arguments import prepare
from .tiles_torch import accumulation_dtype, slices, tiling
from .transforms import eager, fold, loop, rows_of_numbers, unfold


@torch.no_grad()
def top_tokens(
    hidden: Tensor,
    head_weight: Tensor,
    n: int,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The n most probable entries of ``softmax(softcap(logit_scale * (hidden @ head_weight.T + bias)) / temperature)``.

    Exact and deterministic: the probabilities are those of the full softmax, and of equal scores the lower index
    comes first. The vocabulary is walked in chunks; no tensor of size [T, V] is made. Not differentiable.

    Args:
        hidden: [..., D], floating point. Rows with NaN give NaN probabilities and arbitrary valid ids.
        head_weight: [V, D], same dtype and device.
        n: 1 to V.
        bias, temperature, softcap, logit_scale, backend: as for `soft_embed`.

    Returns:
        ids [..., n], int64, and probabilities [..., n], float32 (float64 for float64 inputs), in descending order.

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
        backend=backend,
    )
    inputs, options = call.inputs, call.options
    if hidden.device.type == "meta":
        raise ValueError("hidden: got device meta, expected one with values")
    count = as_integer(n)
    if count is None:
        raise TypeError(f"n: got {type(n).__name__}, expected an int")
    n = count
    num_vocab = head_weight.shape[0]
    if not 1 <= n <= num_vocab:
        raise ValueError(f"n: got {n}, expected 1 to {num_vocab}, the V of head_weight")
    leading = hidden.shape[:-1]
    if torch.compiler.is_compiling():
        inputs, options = rows_of_numbers(inputs, options)
    tensors = [None if t is None else t.detach() for t in (inputs.hidden, inputs.head, inputs.bias, inputs.temperature)]
    scalars = (n, options.temperature, options.softcap, options.logit_scale, backend)
    ids, probs = _run(*tensors, *scalars) if eager(tensors, backend) else _op(*tensors, *scalars)
    return ids.reshape(*leading, n), probs.reshape(*leading, n)


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, head, bias, temperature, n, number, softcap, logit_scale, backend = arguments
    inputs = Inputs(hidden, head, bias=bias, temperature=temperature)
    with no_autocast(hidden.device.type):
        return _top(inputs, Options(number, softcap, logit_scale), n, resolve_backend(backend, hidden))


def _top(inputs: Inputs, options: Options, n: int, backend: str) -> tuple[Tensor, Tensor]:
    (num_rows, width), num_vocab = inputs.hidden.shape, inputs.head.shape[0]
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
    return ids, scores.sub_(peak).exp_().div_(total)


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
    schema="(Tensor hidden, Tensor head, Tensor? bias, Tensor? temperature, SymInt n, float scalar_temperature, "
    "float? softcap, float logit_scale, str? backend) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, n = arguments[0], arguments[4]
    shape = (hidden.shape[0], n)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))


@_op.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    if in_dims[1] is not None or in_dims[2] is not None:  # a batch of matrices
        return loop(_op, info.batch_size, in_dims, arguments)
    head, bias = arguments[1:3]
    hidden, temperature = (fold(arguments[i], in_dims[i], info.batch_size) for i in (0, 3))
    return unfold(_op(hidden, head, bias, temperature, *arguments[4:]), info.batch_size)
