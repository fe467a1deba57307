"""Truncated soft tokens: what `top_k`, `top_p`, `min_p` and `top_n` keep of each row, as one score, its *threshold*.

The rules and their order are those of transformers' generation (temperature, then top-k, top-p, min-p), with top_n
after them, each on what the ones before it kept; noise comes last. With s the scores of a row and P its softmax::

    top_k   s_v >= the k-th largest score                         ties with it stay: more than k may be kept
    top_p   the probability strictly above s_v, among what top_k kept and relative to it, is below top_p
    min_p   P_v >= min_p * max P
    top_n   s_v >= the n-th largest score of what the others kept, ties as for top_k

Each keeps the highest scores, so together they keep ``{v: s_v >= lowest}`` for one score. Entries of one score stay or
go together, whatever their order (a sort, as in transformers, cuts through a tie that straddles top_p). The threshold
lies halfway between the lowest kept score and the next lower one, because other passes compute the same score with
other roundings; scores that differ by no more than that may fall on either side of it.

A block of rows is scored against the whole vocabulary, in memory that does not grow with the rows. The lowest kept
score is found by bisection over the bits of a float: sums and comparisons, no sort, nothing that waits for the device.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from .arguments import check_number, has_no_values, row_values
from .autocast import cast_inputs, no_autocast
from .backends import resolve_backend
from .chunk_scores import chunk_scores, ordered_bits
from .tiles_torch import WORKSPACE_BYTES, accumulation_dtype, slices, tiling
from .transforms import eager, fold, loop, rows_of_numbers, unfold
from .vocab_parallel import find_group

# Floats of a score's size that a block of rows holds of each score: it, its bits, its weight, two temporaries.
_COPIES = 5
# The highest score is kept even where a second one follows within rounding: the threshold stays this many units of
# the larger scores below it, where scores lower than 32 below the highest do not count (a mask of -1e30, say).
_MARGIN, _DEPTH = 32, 32.0


_NO_LIMIT = torch.iinfo(torch.int64).max
# of `Inputs`, in the order of the op
_INPUTS = ("hidden", "head", "bias", "temperature", "bias_values", "bias_ids", "bitmask")


class Truncation(NamedTuple):
    """The rules, one value for each row, [T]; None: no such rule."""

    top_k: Tensor | None = None  # int64, >= 1
    top_p: Tensor | None = None  # floating point, in (0, 1]
    min_p: Tensor | None = None  # floating point, in [0, 1]
    top_n: Tensor | None = None  # int64, >= 1


def check_truncation(hidden: Tensor, top_k: object, top_p: object, min_p: object, top_n: object) -> Truncation:
    """The rules for the rows of hidden [..., D], checked.

    Raises:
        TypeError, ValueError: by the argument's name.
    """
    return Truncation(
        _rule("top_k", top_k, hidden, "at least 1, or 0 or -1 for no limit"),
        _rule("top_p", top_p, hidden, "above 0 and at most 1"),
        _rule("min_p", min_p, hidden, "between 0 and 1"),
        _rule("top_n", top_n, hidden, "at least 1, or 0 or -1 for no limit"),
    )


def _rule(name: str, value: object, hidden: Tensor, expected: str) -> Tensor | None:
    if value is None:
        return None
    whole = name in ("top_k", "top_n")
    if isinstance(value, Tensor):
        if whole and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
            raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer one")
        if not whole and not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point one")
        value = row_values(name, value, hidden)
        if value.device.type == "cpu" and not has_no_values(value) and value.numel():
            for bound in (value.min().item(), value.max().item()):
                _check_range(name, bound, expected)
        value = value.detach().to(torch.int64 if whole else accumulation_dtype(hidden.dtype))
        return torch.where(value <= 0, _NO_LIMIT, value) if whole else value
    if whole:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an int or an integer tensor")
        if value in (0, -1):
            return None
        number: Any = min(int(value), _NO_LIMIT)
    else:
        number = check_number(name, value)
    _check_range(name, number, expected)
    dtype = torch.int64 if whole else accumulation_dtype(hidden.dtype)
    # a product, not `full`: for a compiler the number is then no constant
    return torch.ones(hidden.numel() // hidden.shape[-1], dtype=dtype, device=hidden.device) * number


def _check_range(name: str, value: float, expected: str) -> None:
    fits = value >= -1 if name in ("top_k", "top_n") else 0 <= value <= 1 and (name == "min_p" or value > 0)
    if not fits:  # not a number included
        raise ValueError(f"{name}: got {value}, expected {expected}")


def row_thresholds(
    inputs: Inputs,
    options: Options,
    rules: Truncation,
    *,
    group: str | None = None,
    cast: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The lowest score that each row keeps, [T] in the accumulation dtype; not differentiable.

    Args:
        inputs, options: what defines the scores; they have no noise.
        group: name of the process group over whose ranks the vocabulary is divided.
        cast: autocast's dtype, if it is on.
    """
    detached: Any = (None if t is None else t.detach() for t in inputs)
    inputs = cast_inputs(Inputs(*detached)._replace(embed=None), cast)
    if torch.compiler.is_compiling():
        inputs, options = rows_of_numbers(inputs, options)
    tensors = (*(getattr(inputs, name) for name in _INPUTS), *rules)
    scalars = (options.temperature, options.softcap, options.logit_scale, options.vocab_start, group, backend)
    if eager(tensors, backend):
        return _row_thresholds(tensors, scalars)
    return _threshold_op(*tensors, *scalars)


def _row_thresholds(tensors: Sequence[Tensor | None], scalars: Sequence[Any]) -> Tensor:
    inputs = Inputs(**dict(zip(_INPUTS, tensors, strict=False)))  # type: ignore[arg-type]
    hidden, head = inputs.hidden, inputs.head
    rules = Truncation(*tensors[len(_INPUTS) :])
    number, softcap, logit_scale, start, name, backend = scalars
    options = Options(number, softcap, logit_scale, vocab_start=start)
    across = _Across(None if name is None else find_group(name))
    num_rows, num_vocab, dtype = inputs.num_rows, inputs.num_vocab, accumulation_dtype(hidden.dtype)
    width = 0 if head is None else head.shape[1]
    thresholds = torch.empty(num_rows, dtype=dtype, device=hidden.device)
    # Half of the workspace for the block, the other half for the matrix's chunks.
    largest = across.largest(num_vocab, hidden.device)
    block = max(1, min(num_rows, WORKSPACE_BYTES // 2 // (_COPIES * dtype.itemsize * largest)))
    _, size = tiling(block, num_vocab, tiles=1, per_vocab=2 * width, per_row=0, itemsize=dtype.itemsize)
    with no_autocast(hidden.device.type):
        score = chunk_scores(inputs, options, size, resolve_backend(backend, hidden))
        for rows in slices(num_rows, block):
            scores = torch.empty((rows.stop - rows.start, num_vocab), dtype=dtype, device=hidden.device)
            for vocab in slices(num_vocab, size):
                scores[:, vocab] = score(rows, vocab)
            part = Truncation(*(None if rule is None else rule[rows, None] for rule in rules))
            thresholds[rows] = _threshold(scores, part, across)[:, 0]
    return thresholds


def _threshold(scores: Tensor, rules: Truncation, across: _Across) -> Tensor:
    """[R, 1] from scores [R, V]."""
    lowest = torch.finfo(scores.dtype).min
    peak = across.max(scores.amax(1, keepdim=True)).clamp_min(lowest)
    keys = ordered_bits(scores)
    lowest_key = torch.full_like(peak, torch.iinfo(keys.dtype).min, dtype=keys.dtype)
    if rules.top_k is not None:
        lowest_key = _highest(keys, lambda above: across.sum(above.sum(1, keepdim=True)), rules.top_k)
    if rules.top_p is not None:
        weights = (scores - peak).exp_().masked_fill_(keys < lowest_key, 0.0)
        total = across.sum(weights.sum(1, keepdim=True))
        lowest_key = torch.maximum(
            lowest_key,
            _highest(
                keys,
                lambda above: across.sum(torch.where(above, weights, 0.0).sum(1, keepdim=True)),
                total * rules.top_p,
            ),
        )
    if rules.min_p is not None:
        lowest_key = torch.maximum(lowest_key, ordered_bits(peak + rules.min_p.log()))
    if rules.top_n is not None:
        nth = _highest(keys, lambda above: across.sum(above.sum(1, keepdim=True)), rules.top_n)
        lowest_key = torch.maximum(lowest_key, nth)
    kept = keys >= lowest_key
    last = across.min(torch.where(kept, scores, torch.inf).amin(1, keepdim=True))
    following = across.max(torch.where(kept, -torch.inf, scores).amax(1, keepdim=True))
    # where nothing is removed there is no following score, and -inf keeps everything
    threshold = last / 2 + following / 2
    size = across.max(scores.abs_().amax(1, keepdim=True)).minimum(peak.abs() + _DEPTH)
    return torch.minimum(threshold, peak - _MARGIN * torch.finfo(scores.dtype).eps * size)


def _highest(keys: Tensor, measure: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """The highest integer x [R, 1] for which `measure(keys >= x)` [R, 1] reaches the target, the lowest if none does.

    Bit by bit, from the sign's on.
    """
    info = torch.iinfo(keys.dtype)
    found = torch.full_like(keys[:, :1], info.min)
    for bit in range(info.bits - 1, -1, -1):
        candidate = torch.zeros_like(found) if bit == info.bits - 1 else found + (1 << bit)
        found = torch.where(measure(keys >= candidate) >= target, candidate, found)
    return found


class _Across:
    """Reductions over the shards of a vocabulary, in place; without a group nothing."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.group)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "SUM")

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "MAX")

    def min(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "MIN")

    def largest(self, size: int, device: torch.device) -> int:
        """Blocks must be the same on every rank, whatever the size of its shard. Waits for the device."""
        return size if self.group is None else int(self.max(torch.tensor([size], device=device)).item())


_SCHEMA = (
    "(Tensor hidden, Tensor? head, Tensor? bias, Tensor? temperature, Tensor? bias_values, Tensor? bias_ids, "
    "Tensor? bitmask, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? top_n, "
    "float scalar_temperature, float? softcap, float logit_scale, SymInt vocab_start, str? group, str? backend) "
    "-> Tensor"
)
_NUM_TENSORS = len(_INPUTS) + len(Truncation._fields)


@torch.library.custom_op("gircse::soft_embed_threshold", mutates_args=(), schema=_SCHEMA)
def _threshold_op(*arguments: Any) -> Tensor:
    return _row_thresholds(arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:])


@_threshold_op.register_fake
def _(*arguments: Any) -> Tensor:
    hidden = arguments[0]
    return hidden.new_empty(hidden.shape[:-1].numel(), dtype=accumulation_dtype(hidden.dtype))


@_threshold_op.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    tensors, scalars = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:]
    if in_dims[1] is not None or in_dims[2] is not None:  # a batch of matrices
        (stacked,), (dim,) = loop(lambda *a: (_threshold_op(*a),), info.batch_size, in_dims, arguments)
        return stacked, dim
    folded = [
        tensor if i in (1, 2) else fold(tensor, dim, info.batch_size)
        for i, (tensor, dim) in enumerate(zip(tensors, in_dims, strict=False))
    ]
    (result,), (dim,) = unfold((_threshold_op(*folded, *scalars),), info.batch_size)
    return result, dim
