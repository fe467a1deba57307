"""The options of `soft_embed` that belong to single rows, checked: temperatures, noise, bans, biases, hard rows.

``scores = logits / temperature`` is what the rules of a truncation see. Noise and its temperature come after them::

    (scores + noise_scale * g) / gumbel_temperature      with gumbel_temperature
    scores + noise_scale / temperature * g               without

so that in both cases what the softmax gets is ``scores / divisor + factor * g``: `Noise`, and `with_noise`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from gircse.integers import as_integer

from .arguments import check_dense, check_floating, check_number, has_no_values, row_values, row_vectors
from .tiles_torch import accumulation_dtype


class Noise(NamedTuple):
    """Gumbel noise on the scores that the rules keep: ``scores / divisor + factor * g``."""

    seed: int | None  # of all rows
    seeds: Tensor | None  # [T] int64, instead of the number
    factor: float | Tensor  # [T]
    divisor: float | Tensor  # [T]


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
        temperature: Any = options.temperature if inputs.temperature is None else inputs.temperature
        inputs, options = inputs._replace(temperature=temperature * divisor), options._replace(temperature=1.0)
    if inputs.threshold is not None:  # in units of the scores
        divisor = divisor.detach() if isinstance(divisor, Tensor) else divisor
        inputs = inputs._replace(threshold=(inputs.threshold / divisor).to(inputs.threshold.dtype))
        if inputs.scores is not None:
            column = divisor[:, None] if isinstance(divisor, Tensor) else divisor
            inputs = inputs._replace(scores=(inputs.scores / column).to(inputs.scores.dtype))
    return inputs, options


def positive_by_row(name: str, value: float | Tensor, hidden: Tensor) -> float | Tensor:
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


def check_noise(
    hidden: Tensor,
    temperature: float | Tensor,
    gumbel_seed: int | Tensor | None,
    gumbel_temperature: float | Tensor | None,
    noise_scale: float | Tensor,
) -> Noise | None:
    if gumbel_seed is None:
        if gumbel_temperature is not None:
            raise ValueError("gumbel_temperature: got one without gumbel_seed, expected both")
        if isinstance(noise_scale, Tensor) or check_number("noise_scale", noise_scale) != 1.0:
            raise ValueError("noise_scale: got one without gumbel_seed, expected both")
        return None
    seed, seeds = _check_seed(gumbel_seed, hidden)
    divisor: float | Tensor = 1.0
    if gumbel_temperature is not None:
        temperature = divisor = positive_by_row("gumbel_temperature", gumbel_temperature, hidden)
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


def check_bitmask(bitmask: object, hidden: Tensor, stop: int, whole: bool) -> Tensor:
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


def check_logit_bias(pair: object, hidden: Tensor, num_vocab: int | None) -> tuple[Tensor, Tensor]:
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


def check_hard(hard: object, hidden: Tensor) -> Tensor | None:
    """One bool for each row, [T]; None: no row is hard."""
    if isinstance(hard, Tensor):
        if hard.dtype != torch.bool:
            raise TypeError(f"hard: got dtype {hard.dtype}, expected torch.bool")
        return row_values("hard", hard, hidden)
    if not isinstance(hard, bool):
        raise TypeError(f"hard: got {type(hard).__name__}, expected a bool or a bool tensor")
    return torch.ones(math.prod(hidden.shape[:-1]), dtype=torch.bool, device=hidden.device) if hard else None
