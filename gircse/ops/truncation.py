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
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from gircse_kernels.contract import Truncation
from torch import Tensor

from .arguments import check_number, has_no_values, row_values
from .tiles_torch import accumulation_dtype

# The largest top_k whose entries are looked for one by one.
LARGEST_K = 256
_NO_LIMIT = torch.iinfo(torch.int64).max


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


def capacity_of(top_k: object, top_n: object, *, coarse: bool = False) -> int:
    """How many candidates of a row surely hold what these rules keep, but for ties: a power of two, or 0 where the
    rules are None, keep more than 256, or have values that are not known here.

    Args:
        coarse: the scores are rounded to half precision, where many are equal.
    """
    rule = top_k if _most(top_k) != 0 else top_n  # top_p and min_p need all that top_k keeps, but not what top_n does
    most = _most(rule)
    if not 0 < most <= LARGEST_K:
        return 0
    more = most + 32 if coarse else max(2, most // 16)
    capacity = 16
    while capacity < most + more:
        capacity *= 2
    return capacity


def _most(rule: Any) -> int:
    """The largest number of entries that a rule keeps; 0: there is no rule."""
    if rule is None:
        return 0
    if not isinstance(rule, Tensor):
        return max(0, rule)
    if rule.device.type != "cpu" or has_no_values(rule):
        return _NO_LIMIT
    return int(torch.where(rule <= 0, _NO_LIMIT, rule).max()) if rule.numel() else 1


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
    size, device = math.prod(hidden.shape[:-1]), hidden.device
    if torch.compiler.is_compiling():  # a product: the number is then no constant
        return torch.ones(size, dtype=dtype, device=device) * number
    return torch.full((size,), number, dtype=dtype, device=device)


def _check_range(name: str, value: float, expected: str) -> None:
    fits = value >= -1 if name in ("top_k", "top_n") else 0 <= value <= 1 and (name == "min_p" or value > 0)
    if not fits:  # not a number included
        raise ValueError(f"{name}: got {value}, expected {expected}")
