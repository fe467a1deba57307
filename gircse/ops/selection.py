"""What a truncation keeps of each row, found in one pass over the scores before anything is mixed.

The scores of a block of rows against the whole vocabulary are in memory that does not grow with the rows. Where the
rules keep few entries whatever the scores, these are found first (`candidates_torch`), and the soft token is made of
them alone. Otherwise the lowest score that is kept is found (`thresholds_torch`), and the ordinary pass over the
vocabulary compares with it. So it is where a tie leaves more than the candidates hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gircse_kernels.contract import Candidates, Inputs, Options, Selection, Truncation
from torch import Tensor

from . import soft_embed_triton
from .autocast import cast_inputs, no_autocast
from .backends import resolve_backend
from .candidates_torch import distribution, highest, keep, merge, statistics
from .chunk_scores import chunk_scores
from .row_options import with_noise
from .soft_embed_arguments import Prepared
from .thresholds_torch import Thresholds
from .tiles_torch import WORKSPACE_BYTES, accumulation_dtype, is_copied, slices, tiling
from .transforms import eager, rows_of_numbers, rows_or_loop
from .vocab_parallel import Across, find_group

# Scores that are looked at together, so that what is made of them stays in a cache.
_PART_BYTES = 512 << 10
# of `Inputs`, in the order of the op
_INPUTS = ("hidden", "head", "bias", "temperature", "bias_values", "bias_ids", "bitmask")
_MATRICES = (1, 2)  # what all rows share
_NUM_TENSORS = len(_INPUTS) + len(Truncation._fields)


def narrow(call: Prepared, *, stats: bool) -> tuple[Inputs, Options, tuple[Tensor, ...] | None]:
    """What describes the scores that the softmax gets: what the rules keep, with the noise.

    Returns:
        Inputs and options for the op, and the statistics of the whole distribution without noise, [T] each:
        log-sum-exp, entropy, largest probability, its index; None where nobody wants them or they are those of the op.
    """
    inputs, options, full = call.inputs, call.options, None
    stats = stats and (call.rules is not None or call.noise is not None)
    if call.rules is not None or stats:
        found = select(
            inputs,
            options,
            Truncation() if call.rules is None else call.rules,
            call.capacity,
            stats=stats,
            group=call.group,
            cast=call.cast,
            backend=call.backend,
        )
        if call.rules is not None:
            inputs = _narrowed(inputs, options, found, call.group)
        if stats:
            full = found[1:5]
    return *with_noise(inputs, options, call.noise), full


def _narrowed(inputs: Inputs, options: Options, found: Selection, group: str | None) -> Inputs:
    """With what is kept, as the op gets it: ids of this shard, whose scores alone count."""
    ids, scores = found.ids, found.scores
    if group is not None and ids is not None and scores is not None:
        ids, last = ids - options.vocab_start, inputs.num_vocab - 1
        scores = scores.masked_fill((ids < 0) | (ids > last), -torch.inf)
        ids = ids.clamp(0, max(0, last))
    return inputs._replace(threshold=found.threshold, ids=ids, scores=scores, num_kept=found.num_kept)


def select(
    inputs: Inputs,
    options: Options,
    rules: Truncation,
    capacity: int = 0,
    *,
    stats: bool = False,
    group: str | None = None,
    cast: torch.dtype | None = None,
    backend: str | None = None,
) -> Selection:
    """What the rules keep; not differentiable.

    Args:
        inputs, options: what defines the scores; they have no noise.
        capacity: how many candidates to look for, more than top_k (or else top_n) keeps but for ties; 0: none.
        stats: whether to return the statistics of the whole distribution.
        group: name of the process group over whose ranks the vocabulary is divided.
        cast: autocast's dtype, if it is on.
    """
    detached: Any = (None if t is None else t.detach() for t in inputs)
    inputs = cast_inputs(Inputs(*detached)._replace(embed=None), cast)
    if torch.compiler.is_compiling():
        inputs, options = rows_of_numbers(inputs, options)
    if inputs.hidden.device.type != "cpu" and not _fused(inputs, backend):  # nothing may read a value there
        capacity = 0
    tensors = (*(getattr(inputs, name) for name in _INPUTS), *rules)
    scalars = (
        *(options.temperature, options.softcap, options.logit_scale, options.vocab_start),
        *(capacity, stats, group, backend),
    )
    run = _select if eager(tensors, backend) else _op
    found = Selection(*run(*tensors, *scalars))
    return found if capacity else found._replace(ids=None, scores=None, num_kept=None)


def _select(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, scalars = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:]
    inputs, rules = Inputs(**dict(zip(_INPUTS, tensors, strict=False))), Truncation(*tensors[len(_INPUTS) :])
    number, softcap, logit_scale, start, capacity, stats, group, backend = scalars
    options = Options(number, softcap, logit_scale, vocab_start=start)
    across = Across(None if group is None else find_group(group))
    with no_autocast(inputs.hidden.device.type):
        if group is None and _fused(inputs, backend):
            return _filled(soft_embed_triton.select(inputs, options, rules, capacity), capacity, stats)
        return _filled(_torch(inputs, options, rules, capacity, stats, across, backend), capacity, stats)


def _fused(inputs: Inputs, backend: str | None) -> bool:
    return resolve_backend(backend, inputs.hidden) == "triton" and soft_embed_triton.takes(inputs)


def _filled(found: Selection, capacity: int, stats: bool) -> tuple[Tensor, ...]:
    """An empty tensor for what was not asked for: an op returns tensors."""
    threshold, *rest = found
    rows, dtypes = threshold.shape[0], (*[threshold.dtype] * 3, torch.int64)
    if not stats:
        rest[:4] = [threshold.new_empty(0, dtype=dtype) for dtype in dtypes]
    if not capacity:
        rest[4:] = [
            threshold.new_empty((rows, 0), dtype=dtype) for dtype in (torch.int64, threshold.dtype, torch.int64)
        ]
    return threshold, *rest  # type: ignore[arg-type]


def _torch(
    inputs: Inputs, options: Options, rules: Truncation, capacity: int, stats: bool, across: Across, backend: str | None
) -> Selection:
    if capacity:
        sums = stats or rules.top_k is None  # without top_k, top_p is a part of the whole
        found = _candidates(inputs, options, capacity, sums, across, backend)
        chosen = keep(found, rules)
        assert chosen.num_kept is not None
        if not bool((chosen.num_kept >= capacity).any()):
            return chosen
        general = _torch(inputs, options, rules, 0, False, across, backend)
        return chosen._replace(threshold=general.threshold)
    threshold = inputs.hidden.new_empty(inputs.num_rows, dtype=accumulation_dtype(inputs.hidden.dtype))
    found = _no_candidates(inputs.num_rows, 0, threshold)
    search, largest = Thresholds(across), across.largest(inputs.num_vocab, threshold.device)
    for part, scores in _blocks(inputs, options, largest, backend):
        threshold[part] = search(scores, Truncation(*(None if rule is None else rule[part] for rule in rules)))
        if stats:
            _take(found, part, distribution(scores), options.vocab_start)
    return Selection(threshold, *statistics(merge(found, across)))


def _candidates(
    inputs: Inputs, options: Options, capacity: int, sums: bool, across: Across, backend: str | None
) -> Candidates:
    if _fused(inputs, backend):
        return merge(soft_embed_triton.candidates(inputs, options, capacity), across)
    wide = inputs.hidden.new_empty(0, dtype=accumulation_dtype(inputs.hidden.dtype))
    found = _no_candidates(inputs.num_rows, capacity, wide)
    for part, scores in _blocks(inputs, options, inputs.num_vocab, backend):
        found.ids[part], found.scores[part] = highest(scores, capacity)
        if sums:
            _take(found, part, distribution(scores), options.vocab_start)
    found.ids.add_(options.vocab_start)
    if not sums:
        found.peak.copy_(found.scores[:, 0].clamp_min(torch.finfo(wide.dtype).min))
    return merge(found, across)


def _no_candidates(rows: int, capacity: int, like: Tensor) -> Candidates:
    ids, argmax = (like.new_zeros(shape, dtype=torch.int64) for shape in ((rows, capacity), (rows,)))
    peak, total, moment = (like.new_zeros(rows) for _ in range(3))
    return Candidates(ids, like.new_empty(rows, capacity), peak, total, moment, argmax)


def _take(found: Candidates, rows: slice, sums: Sequence[Tensor], start: int) -> None:
    for whole, part in zip(found[2:], sums, strict=True):
        whole[rows] = part
    found.argmax[rows] += start


def _blocks(inputs: Inputs, options: Options, largest: int, backend: str | None) -> Iterator[tuple[slice, Tensor]]:
    """The scores [R, V] of a few rows at a time, which are the caller's until the next.

    Where ranks look at the same rows together, ``largest`` is the V of the largest shard.

    A block of rows is scored in half of the workspace, and handed out in parts that stay in a cache.
    """
    num_rows, num_vocab, head = inputs.num_rows, inputs.num_vocab, inputs.head
    dtype, device = accumulation_dtype(inputs.hidden.dtype), inputs.hidden.device
    largest, size = max(1, largest), num_vocab
    block = max(1, min(num_rows, WORKSPACE_BYTES // 2 // (dtype.itemsize * largest)))
    part = max(1, min(block, _PART_BYTES // (dtype.itemsize * largest)))
    if head is not None and num_vocab and is_copied(head, dtype):
        _, size = tiling(block, num_vocab, tiles=1, per_vocab=2 * head.shape[1], per_row=0, itemsize=dtype.itemsize)
    score = chunk_scores(inputs, options, size, resolve_backend(backend, inputs.hidden))
    at_once = size == num_vocab > 0
    buffer = torch.empty((0 if at_once else block, num_vocab), dtype=dtype, device=device)
    for rows in slices(num_rows, block):
        if at_once:
            scores = score(rows, slice(0, num_vocab))
        else:
            scores = buffer[: rows.stop - rows.start]
            for vocab in slices(num_vocab, max(1, size)):
                scores[:, vocab] = score(rows, vocab)
        for some in slices(rows.stop - rows.start, part):
            yield slice(rows.start + some.start, rows.start + some.stop), scores[some]


_op = torch.library.custom_op(
    "gircse::soft_embed_selection",
    _select,
    mutates_args=(),
    schema="(Tensor hidden, Tensor? head, Tensor? bias, Tensor? temperature, Tensor? bias_values, Tensor? bias_ids, "
    "Tensor? bitmask, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? top_n, "
    "float scalar_temperature, float? softcap, float logit_scale, SymInt vocab_start, "
    "int capacity, bool stats, str? group, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, (capacity, stats) = arguments[0], arguments[-4:-2]
    rows, wide = math.prod(hidden.shape[:-1]), accumulation_dtype(hidden.dtype)
    threshold, lse, entropy, max_prob = (hidden.new_empty(rows, dtype=wide) for _ in range(4))
    argmax, num_kept = (hidden.new_empty(rows, dtype=torch.int64) for _ in range(2))
    ids, scores = (hidden.new_empty((rows, capacity), dtype=dtype) for dtype in (torch.int64, wide))
    found = Selection(threshold, lse, entropy, max_prob, argmax, ids, scores, num_kept)
    return _filled(found, capacity, stats)


@_op.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    return rows_or_loop(_op, _MATRICES, _NUM_TENSORS, info.batch_size, in_dims, arguments)
