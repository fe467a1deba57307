"""The arguments that `soft_embed` and its kin share, checked in one place and laid out by rows for the ops."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from gircse_kernels.contract import Inputs, Options, Truncation
from torch import Tensor

from .arguments import DTYPES, check_floating, check_like, check_number
from .autocast import autocast_dtype
from .backends import check_backend
from .row_options import Noise, check_bitmask, check_hard, check_logit_bias, check_noise, positive_by_row
from .tiles_torch import accumulation_dtype
from .truncation import capacity_of, check_truncation
from .vocab_parallel import VocabShard, group_name


class Prepared(NamedTuple):
    """A checked call. Tensors with a value for each row are [T, ..]."""

    inputs: Inputs  # of the scores that the rules see; without noise and threshold
    options: Options
    noise: Noise | None  # None: no row has any
    rules: Truncation | None  # None: everything is kept
    group: str | None  # of the shard
    cast: torch.dtype | None  # autocast's
    out_dtype: torch.dtype | None  # None: hidden's, or autocast's
    embed_scale: Tensor | None  # one that is a tensor: the caller multiplies with it and casts to `out_dtype`, not None
    op_dtype: torch.dtype | None  # what the op returns before that
    capacity: int  # of the candidates that hold what the rules keep; 0: any number may be kept
    backend: str | None


def prepare(
    hidden: Tensor,
    head_weight: Tensor | None,
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
    backend: str | None = None,
) -> Prepared:
    """The arguments of `soft_embed`, which describes them, checked.

    Args:
        head_weight: None where ``hidden`` holds the logits [..., V] themselves.

    Raises:
        TypeError, ValueError: by the argument's name.
    """
    cast = autocast_dtype(hidden)
    rows_name = "hidden" if head_weight is not None else "logits"
    check_floating(rows_name, hidden)
    if head_weight is not None:
        _check_head(hidden, head_weight, cast, vocab_parallel is not None)
        num_vocab = head_weight.shape[0]
        if embed_weight is not None:
            _check_embed(embed_weight, head_weight.shape[0], "head_weight", head_weight, cast)
            if embed_weight is head_weight:
                embed_weight = None
    else:
        num_vocab = _check_logits(hidden, embed_weight, cast, vocab_parallel is not None)
    if bias is not None:
        _check_bias(bias, num_vocab, rows_name, hidden, cast)
    group, start = None, 0
    if vocab_parallel is not None:
        group, start = _check_shard(vocab_parallel, num_vocab), vocab_parallel.start
    check_backend(backend)
    if softcap is not None:
        softcap = check_number("softcap", softcap)
        if softcap < 0:
            raise ValueError(f"softcap: got {softcap}, expected a number above 0, or 0 or None for none")
        softcap = softcap or None
    if type(temperature) is not float or temperature != 1.0:
        temperature = positive_by_row("temperature", temperature, hidden)
    divisor = temperature  # of the noise
    if isinstance(logit_scale, Tensor):
        factor, logit_scale = _scale("logit_scale", logit_scale, hidden), 1.0
        if softcap is None:
            temperature = (temperature / factor.to(accumulation_dtype(hidden.dtype))).expand(
                math.prod(hidden.shape[:-1])
            )
        else:
            hidden, bias = hidden * factor, None if bias is None else bias * factor
    elif type(logit_scale) is not float or logit_scale != 1.0:
        logit_scale = check_number("logit_scale", logit_scale)
    by_row = isinstance(temperature, Tensor)
    inputs = Inputs(
        _as_rows(hidden, copy=head_weight is not None),
        head_weight,
        embed_weight,
        bias,
        temperature if by_row else None,  # type: ignore[arg-type]
    )
    if out_dtype is not None:
        _check_out_dtype(out_dtype)
    op_dtype, scale = out_dtype, None
    if isinstance(embed_scale, Tensor):
        scale, embed_scale = _scale("embed_scale", embed_scale, hidden), 1.0
        op_dtype = accumulation_dtype(hidden.dtype)
        if out_dtype is None:
            out_dtype = inputs.out_dtype if cast is None or hidden.dtype == torch.float64 else cast
    elif type(embed_scale) is not float or embed_scale != 1.0:
        embed_scale = check_number("embed_scale", embed_scale)
    number: Any = 1.0 if by_row else temperature
    options = Options(number, softcap, logit_scale, embed_scale, vocab_start=start)
    if logit_bias is not None:
        ids, values = check_logit_bias(logit_bias, hidden, None if group is not None else num_vocab)
        inputs = inputs._replace(bias_values=values, bias_ids=ids)
    if token_bitmask is not None:
        inputs = inputs._replace(bitmask=check_bitmask(token_bitmask, hidden, start + num_vocab, group is None))
    rules = None
    if top_k is not None or top_p is not None or min_p is not None or top_n is not None:
        rules = check_truncation(hidden, top_k, top_p, min_p, top_n)
        if all(rule is None for rule in rules):  # top_k=0 alone
            rules = None
    noise = None
    if (
        gumbel_seed is not None
        or gumbel_temperature is not None
        or type(noise_scale) is not float
        or noise_scale != 1.0
    ):
        noise = check_noise(hidden, divisor, gumbel_seed, gumbel_temperature, noise_scale)
    if hard is not False:
        inputs = inputs._replace(hard=check_hard(hard, hidden))
    coarse = rows_name == "logits" and hidden.dtype.itemsize < 4
    capacity = 0 if rules is None else capacity_of(top_k, top_n, coarse=coarse)
    return Prepared(inputs, options, noise, rules, group, cast, out_dtype, scale, op_dtype, capacity, backend)


def _as_rows(hidden: Tensor, copy: bool) -> Tensor:
    """As a matrix of rows; if it would have to be copied for that, and may not be, as it is."""
    if hidden.dim() == 2:
        return hidden
    step = None  # between the entries of a dimension, if all later ones are one with it
    for size, stride in zip(reversed(hidden.shape[:-1]), reversed(hidden.stride()[:-1]), strict=True):
        if not copy and size != 1 and step is not None and stride != step:
            return hidden
        step = stride * size if size != 1 else step
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])


def _check_head(hidden: Tensor, head_weight: Tensor, cast: torch.dtype | None, shard: bool) -> None:
    check_floating("head_weight", head_weight)
    if hidden.dim() < 1:
        raise ValueError("hidden: got a 0-dimensional tensor, expected [..., D]")
    if head_weight.dim() != 2:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}, expected [V, D]")
    if head_weight.shape[1] == 0 or (head_weight.shape[0] == 0 and not shard):
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}, expected V and D of at least 1")
    if hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, expected a last dimension of {head_weight.shape[1]}, "
            f"the D of head_weight {tuple(head_weight.shape)}"
        )
    check_like("head_weight", head_weight, "hidden", hidden, cast)


def _check_logits(logits: Tensor, embed_weight: Tensor | None, cast: torch.dtype | None, shard: bool) -> int:
    if logits.dim() < 1 or (logits.shape[-1] == 0 and not shard):
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V of at least 1")
    check_floating("embed_weight", embed_weight)
    _check_embed(embed_weight, logits.shape[-1], "logits", logits, cast)  # type: ignore[arg-type]
    return logits.shape[-1]


def _check_embed(
    embed_weight: Tensor, num_vocab: int, other_name: str, other: Tensor, cast: torch.dtype | None
) -> None:
    check_floating("embed_weight", embed_weight)
    if embed_weight.dim() != 2 or embed_weight.shape[0] != num_vocab or embed_weight.shape[1] == 0:
        raise ValueError(
            f"embed_weight: got shape {tuple(embed_weight.shape)}, expected [{num_vocab}, E] "
            f"with E of at least 1, one row for each entry of {other_name} {tuple(other.shape)}"
        )
    check_like("embed_weight", embed_weight, other_name, other, cast, mixed=True)


def _check_bias(bias: Tensor, num_vocab: int, rows_name: str, hidden: Tensor, cast: torch.dtype | None) -> None:
    check_floating("bias", bias)
    if bias.shape != (num_vocab,):
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}, expected ({num_vocab},), one entry for each of the vocabulary"
        )
    check_like("bias", bias, rows_name, hidden, cast, mixed=True)


def _check_shard(shard: object, num_vocab: int) -> str:
    """The name of the shard's process group."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"vocab_parallel: got {type(shard).__name__}, expected a VocabShard")
    if shard.stop - shard.start != num_vocab:
        raise ValueError(
            f"head_weight: got {num_vocab} rows, expected {shard.stop - shard.start}, "
            f"those of vocab_parallel from {shard.start} to {shard.stop}"
        )
    return group_name(shard)


def _scale(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    """A scale that is a tensor, 0-dimensional."""
    check_floating(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected one number")
    if value.device != hidden.device:
        raise ValueError(f"{name}: got device {value.device}, expected {hidden.device}, the device of the rows")
    return value.reshape(())


def _check_out_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"out_dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
