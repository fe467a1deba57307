"""The arguments that `soft_embed` and its kin share, checked in one place and laid out by rows for the ops.

``scores = logits / temperature`` is what the rules of a truncation see. Noise and its temperature come after them::

    (scores + noise_scale * g) / gumbel_temperature      with gumbel_temperature
    scores + noise_scale / temperature * g               without

so that in both cases what the softmax gets is ``scores / divisor + factor * g``: `Noise`, and `with_noise`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gircse_kernels.contract import Inputs, Options, Truncation
from torch import Tensor

from gircse.integers import as_integer

from .arguments import (
    DTYPES,
    check_dense,
    check_floating,
    check_like,
    check_number,
    has_no_values,
    row_values,
    row_vectors,
)
from .autocast import autocast_dtype
from .backends import check_backend
from .tiles_torch import accumulation_dtype
from .truncation import capacity_of, check_truncation
from .vocab_parallel import VocabShard, group_name


class Noise(NamedTuple):
    """Gumbel noise on the scores that the rules keep: ``scores / divisor + factor * g``."""

    seed: int | None  # of all rows
    seeds: Tensor | None  # [T] int64, instead of the number
    factor: float | Tensor  # [T]
    divisor: float | Tensor  # [T]


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
    temperature = _positive("temperature", temperature, hidden)
    divisor = temperature  # of the noise
    if isinstance(logit_scale, Tensor):
        factor, logit_scale = _scale("logit_scale", logit_scale, hidden), 1.0
        if softcap is None:
            temperature = (temperature / factor.to(accumulation_dtype(hidden.dtype))).expand(_count(hidden))
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
        ids, values = _check_logit_bias(logit_bias, hidden, None if group is not None else num_vocab)
        inputs = inputs._replace(bias_values=values, bias_ids=ids)
    if token_bitmask is not None:
        inputs = inputs._replace(bitmask=_check_bitmask(token_bitmask, hidden, start + num_vocab, group is None))
    rules = None
    if top_k is not None or top_p is not None or min_p is not None or top_n is not None:
        rules = check_truncation(hidden, top_k, top_p, min_p, top_n)
        if all(rule is None for rule in rules):  # top_k=0 alone
            rules = None
    noise = _check_noise(hidden, divisor, gumbel_seed, gumbel_temperature, noise_scale)
    inputs = inputs._replace(hard=_check_hard(hard, hidden))
    coarse = rows_name == "logits" and hidden.dtype.itemsize < 4
    capacity = 0 if rules is None else capacity_of(top_k, top_n, coarse=coarse)
    return Prepared(inputs, options, noise, rules, group, cast, out_dtype, scale, op_dtype, capacity, backend)


def with_noise(inputs: Inputs, options: Options, noise: Noise | None) -> tuple[Inputs, Options]:
    """What describes the scores that the softmax gets, from what describes those that the rules saw."""
    if noise is None:
        return inputs, options
    inputs, options = inputs._replace(seeds=noise.seeds), options._replace(seed=noise.seed)
    if isinstance(noise.factor, Tensor):
        inputs = inputs._replace(noise_scale=noise.factor)
    else:
        options = options._replace(noise_scale=noise.factor)
    divisor = noise.divisor
    if not isinstance(divisor, Tensor) and inputs.temperature is None:
        options = options._replace(temperature=options.temperature * divisor)
    else:
        temperature = options.temperature if inputs.temperature is None else inputs.temperature
        inputs, options = inputs._replace(temperature=temperature * divisor), options._replace(temperature=1.0)
    if inputs.threshold is not None:  # in units of the scores
        divisor = divisor.detach() if isinstance(divisor, Tensor) else divisor
        inputs = inputs._replace(threshold=(inputs.threshold / divisor).to(inputs.threshold.dtype))
        if inputs.scores is not None:
            column = divisor[:, None] if isinstance(divisor, Tensor) else divisor
            inputs = inputs._replace(scores=(inputs.scores / column).to(inputs.scores.dtype))
    return inputs, options


def _as_rows(hidden: Tensor, copy: bool) -> Tensor:
    """As a matrix of rows; if it would have to be copied for that, and may not be, as it is."""
    if hidden.dim() == 2:
        return hidden
    step = None  # between the entries of a dimension, if all later ones are one with it
    for size, stride in zip(reversed(hidden.shape[:-1]), reversed(hidden.stride()[:-1]), strict=True):
        if not copy and size != 1 and step is not None and stride != step:
            return hidden
        step = stride * size if size != 1 else step
    return hidden.reshape(_count(hidden), hidden.shape[-1])


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


def _positive(name: str, value: float | Tensor, hidden: Tensor) -> float | Tensor:
    """A temperature: a number, or a tensor with one value for each row, [T]."""
    if not isinstance(value, Tensor):
        return value if type(value) is float and value == 1.0 else check_number(name, value, positive=True)
    rows = _row_numbers(name, value, hidden)
    # On an accelerator the comparison would wait for the device; a compiler has no values.
    if value.device.type == "cpu" and not has_no_values(value) and not bool((value > 0).all()):
        raise ValueError(f"{name}: got {value.detach().min().item()}, expected values above 0")
    return rows


def _row_numbers(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    check_floating(name, value)
    return row_values(name, value, hidden)


def _scale(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    """A scale that is a tensor, 0-dimensional."""
    check_floating(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected one number")
    if value.device != hidden.device:
        raise ValueError(f"{name}: got device {value.device}, expected {hidden.device}, the device of hidden")
    return value.reshape(())


def _count(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1] if hidden.shape[-1] else 0


def _check_out_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"out_dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")


def _check_bitmask(bitmask: object, hidden: Tensor, stop: int, whole: bool) -> Tensor:
    """[T, W] int32, with a bit for each entry of the vocabulary up to ``stop``."""
    if not isinstance(bitmask, Tensor):
        raise TypeError(f"token_bitmask: got {type(bitmask).__name__}, expected a torch.Tensor")
    check_dense("token_bitmask", bitmask)
    if bitmask.dtype != torch.int32:
        raise TypeError(f"token_bitmask: got dtype {bitmask.dtype}, expected torch.int32")
    words = -(-stop // 32)
    if bitmask.dim() < 1 or (bitmask.shape[-1] != words if whole else bitmask.shape[-1] < words):
        raise ValueError(
            f"token_bitmask: got shape {tuple(bitmask.shape)}, expected a last dimension of {words}"
            f"{'' if whole else ' or more'}, one bit for each of {stop} entries"
        )
    return row_vectors("token_bitmask", bitmask, hidden)


def _check_logit_bias(pair: object, hidden: Tensor, num_vocab: int | None) -> tuple[Tensor, Tensor]:
    """Ids and values, [T, m] each."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"logit_bias: got {type(pair).__name__}, expected a pair of ids [T, m] and values [T, m]")
    ids, values = pair
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"logit_bias: got ids of {_kind(ids)}, expected an int64 or int32 tensor")
    check_dense("logit_bias", ids)
    check_floating("logit_bias", values)
    if ids.shape != values.shape or ids.dim() < 1:
        raise ValueError(
            f"logit_bias: got ids {tuple(ids.shape)} and values {tuple(values.shape)}, expected one shape, [T, m]"
        )
    if num_vocab is not None and ids.numel() and ids.device.type == "cpu" and not has_no_values(ids):
        lowest, highest = ids.min().item(), ids.max().item()
        if lowest < -1 or highest >= num_vocab:
            raise ValueError(
                f"logit_bias: got ids from {lowest} to {highest}, expected 0 to {num_vocab - 1}, or -1 for none"
            )
    return row_vectors("logit_bias", ids, hidden).to(torch.int64), row_vectors("logit_bias", values, hidden)


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _check_noise(
    hidden: Tensor,
    temperature: float | Tensor,
    gumbel_seed: int | Tensor | None,
    gumbel_temperature: float | Tensor | None,
    noise_scale: float | Tensor,
) -> Noise | None:
    if gumbel_seed is None:
        if gumbel_temperature is not None:
            raise ValueError("gumbel_temperature: got one without gumbel_seed, expected both")
        if isinstance(noise_scale, Tensor) or noise_scale != 1.0:
            raise ValueError("noise_scale: got one without gumbel_seed, expected both")
        return None
    seed, seeds = _check_seed(gumbel_seed, hidden)
    divisor: float | Tensor = 1.0
    if gumbel_temperature is not None:
        temperature = divisor = _positive("gumbel_temperature", gumbel_temperature, hidden)
    factor: float | Tensor
    if isinstance(noise_scale, Tensor):
        factor = _row_numbers("noise_scale", noise_scale, hidden)
        known = factor.device.type == "cpu" and not has_no_values(factor)
        if known and not bool((factor >= 0).all()):
            raise ValueError(f"noise_scale: got {factor.detach().min().item()}, expected values of at least 0")
    else:
        factor = check_number("noise_scale", noise_scale)
        if factor < 0:
            raise ValueError(f"noise_scale: got {factor}, expected a number of at least 0")
    wide = accumulation_dtype(hidden.dtype)
    if isinstance(factor, Tensor) or isinstance(temperature, Tensor):
        top, bottom = (value.to(wide) if isinstance(value, Tensor) else value for value in (factor, temperature))
        factor = top / bottom
    else:
        factor = factor / temperature
    return Noise(seed, seeds, factor, divisor.to(wide) if isinstance(divisor, Tensor) else divisor)


def _check_seed(seed: object, hidden: Tensor) -> tuple[int | None, Tensor | None]:
    """A seed for all rows, or one for each, [T]."""
    if isinstance(seed, Tensor):
        if seed.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"gumbel_seed: got dtype {seed.dtype}, expected torch.int64 or torch.int32")
        return None, row_values("gumbel_seed", seed, hidden).to(torch.int64)
    number = as_integer(seed)
    if number is None:
        raise TypeError(f"gumbel_seed: got {type(seed).__name__}, expected an int or an integer tensor")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"gumbel_seed: got {number}, expected a number of 64 bits, -2**63 to 2**63 - 1")
    return number, None


def _check_hard(hard: object, hidden: Tensor) -> Tensor | None:
    """One bool for each row, [T]; None: no row is hard."""
    if isinstance(hard, Tensor):
        if hard.dtype != torch.bool:
            raise TypeError(f"hard: got dtype {hard.dtype}, expected torch.bool")
        return row_values("hard", hard, hidden)
    if not isinstance(hard, bool):
        raise TypeError(f"hard: got {type(hard).__name__}, expected a bool or a bool tensor")
    return torch.ones(_count(hidden), dtype=torch.bool, device=hidden.device) if hard else None
