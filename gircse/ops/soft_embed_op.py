"""``soft_embed`` as a differentiable op: the choice of backend, shards, and casts, around forward and backward.

Nothing here reads a value of a tensor on a device, so both can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gircse_kernels.contract import Forward, Inputs, Needs, Options, Saved
from torch import Tensor

from . import kept_rows, observers, soft_embed_torch, soft_embed_triton
from .autocast import cast_inputs, no_autocast
from .backends import resolve_backend
from .differentiable_op import DifferentiableOp, Tensors
from .soft_embed_plain import plain, plain_rows
from .soft_embed_torch import finish
from .straight_through import harden, tokens
from .tiles_torch import accumulation_dtype
from .transforms import alone, rows_of_numbers
from .vocab_parallel import find_group, merge_shards, sum_shards


class Call(NamedTuple):
    """Everything of a call that is no tensor."""

    options: Options
    group: str | None = None  # of a vocabulary-parallel call
    stats: bool = False
    exact: bool = False  # a gradient will be wanted: keep what backward needs
    keep: bool = False  # and the probabilities, as far as the backend's budget for them allows
    cast: torch.dtype | None = None  # autocast's, for all tensors but float64 ones
    out_dtype: torch.dtype | None = None  # None: that of `Inputs`
    backend: str | None = None

    def flat(self) -> tuple[Any, ...]:
        """As the ops take it."""
        return (*self.options, *self[1:])

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Call:
        size = len(Options._fields)
        return cls(Options(*flat[:size]), *flat[size:])


class Results(NamedTuple):
    """What a caller gets, and behind it what backward reads: copies of their own, which no caller can change."""

    out: Tensor  # [T, E], input dtype
    lse: Tensor | None  # [T]
    entropy: Tensor | None  # [T]
    max_prob: Tensor | None  # [T]
    argmax: Tensor | None  # [T]
    kept_out: Tensor | None = None
    peak: Tensor | None = None
    total: Tensor | None = None
    kept_entropy: Tensor | None = None
    kept_probs: Tensor | None = None  # [T, V]
    kept_token: Tensor | None = None  # [T]


def run(inputs: Inputs, call: Call) -> Results:
    """The op by the cheapest entrance that fits."""
    if torch.compiler.is_compiling():
        inputs, options = rows_of_numbers(inputs, call.options)
        return Results(*OP.op(*inputs, *call._replace(options=options).flat()))
    if observers.transformed() or observers.forward_mode():  # whether a gradient will be wanted shows later
        call = call._replace(exact=True)
    elif alone(inputs, call.backend):
        if not call.exact:
            return _forward(inputs, call)
        call = call._replace(keep=True)  # a compiler or a mode would have to know the backend's budget
    return Results(*OP.call(inputs, call.flat()))


def _module(inputs: Inputs, call: Call) -> ModuleType:
    fused = resolve_backend(call.backend, inputs.hidden) == "triton" and soft_embed_triton.takes(inputs)
    if fused:
        return soft_embed_triton
    return kept_rows if kept_rows.fits(inputs) else soft_embed_torch


def _forward(inputs: Inputs, call: Call) -> Results:
    if call.cast is not None:
        inputs = cast_inputs(inputs, call.cast)
    module, exact = _module(inputs, call), call.exact or call.out_dtype is not None
    group = None if call.group is None else find_group(call.group)
    stats = call.stats or inputs.hard is not None  # which say where the highest score is
    with no_autocast(inputs.hidden.device.type):
        if group is None:
            found = module.forward(inputs, call.options, stats=stats, exact=exact, keep=call.keep)
        else:
            state = module.scan(inputs, call.options, stats=stats)
            state = merge_shards(state, call.options.vocab_start, group)
            found = finish(state, call.options, inputs.out_dtype, exact=exact)
        if call.out_dtype is not None and found.exact is not None:
            found = found._replace(out=found.exact.to(call.out_dtype, copy=call.exact))
        if inputs.hard is not None:
            found = harden(found, inputs, call.options, group)
    return _results(found, inputs.hard, call)


def _results(found: Forward, hard: Tensor | None, call: Call) -> Results:
    """Of what a backend found, what was asked for."""
    out, exact, *stats, peak, total, probs = found
    lse, entropy, max_prob, argmax = stats if call.stats else (None,) * 4
    if not call.exact:
        return Results(out, lse, entropy, max_prob, argmax)
    kept = None if entropy is None else entropy.clone()
    return Results(out, lse, entropy, max_prob, argmax, exact, peak, total, kept, probs, tokens(found, hard))


class _SoftEmbed(DifferentiableOp):
    name = "soft_embed"
    tensors = (
        "Tensor hidden, Tensor? head, Tensor? embed, Tensor? bias, Tensor? temperature, Tensor? noise_scale, "
        "Tensor? bias_values, Tensor? bias_ids, Tensor? seeds, Tensor? threshold, Tensor? bitmask, Tensor? ids, "
        "Tensor? scores, Tensor? num_kept, Tensor? hard, Tensor? places"
    )
    scalars = (
        "float scalar_temperature, float? softcap, float logit_scale, float embed_scale, SymInt? seed, "
        "SymInt vocab_start, float scalar_noise_scale, str? group, bool stats, bool exact, bool keep, "
        "ScalarType? cast, ScalarType? out_dtype, str? backend"
    )
    num_tensors, num_inputs, num_results = len(Inputs._fields), len(Needs._fields), len(Results._fields)
    upstream = (0, 1, 2)  # out, lse, entropy
    saved = (5, 6, 7, 8, 9, 10)
    shared = (1, 2, 3)

    def forward(self, tensors: Tensors, scalars: Sequence[Any]) -> Tensors:
        return _forward(Inputs(*tensors), Call.of(scalars))  # type: ignore[arg-type]

    def fake(self, tensors: Tensors, scalars: Sequence[Any]) -> Tensors:
        inputs, call = Inputs(*tensors), Call.of(scalars)  # type: ignore[arg-type]
        hidden, dtype = inputs.hidden, inputs.out_dtype
        if call.cast is not None and dtype != torch.float64:
            dtype = call.cast
        rows, width, wide = inputs.num_rows, inputs.values.shape[1], accumulation_dtype(hidden.dtype)

        def row(dtype: torch.dtype = wide) -> Tensor:
            return hidden.new_empty(rows, dtype=dtype)

        return Results(
            hidden.new_empty((rows, width), dtype=call.out_dtype or dtype),
            row() if call.stats else None,
            row() if call.stats else None,
            row() if call.stats else None,
            row(torch.int64) if call.stats else None,
            hidden.new_empty((rows, width), dtype=wide) if call.exact else None,
            row() if call.exact else None,
            row() if call.exact else None,
            row() if call.stats and call.exact else None,
            None,
            row(torch.int64) if inputs.hard is not None and call.exact else None,
        )

    def backward(
        self, grads: Tensors, tensors: Tensors, saved: Tensors, scalars: Sequence[Any], needs: Sequence[bool]
    ) -> Tensors:
        originals, call = Inputs(*tensors), Call.of(scalars)  # type: ignore[arg-type]
        out, peak, total, *rest = saved  # stand-ins of what there is not are empty
        kept = Saved(out, peak, total, *(None if t is None or not t.numel() else t for t in rest))  # type: ignore[arg-type]
        found = _backward(grads, cast_inputs(originals, call.cast), kept, call, Needs(*needs))
        return tuple(
            None if grad is None or tensor is None else grad.to(tensor.dtype).view(tensor.shape)
            for grad, tensor in zip(found, originals, strict=False)
        )

    def plain(self, tensors: Tensors, scalars: Sequence[Any]) -> Sequence[Tensor]:
        originals, call = Inputs(*tensors), Call.of(scalars)  # type: ignore[arg-type]
        return plain(cast_inputs(originals, call.cast), call.options, call.out_dtype)

    def block(self, tensors: Tensors) -> int:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        return plain_rows(inputs) // max(1, math.prod(inputs.hidden.shape[1:-1]))

    def eager(self, tensors: Tensors, scalars: Sequence[Any]) -> bool:
        return alone(tensors, scalars[-1])

    def constant(self, scalars: Sequence[Any]) -> tuple[int, ...]:
        stats = scalars[len(Options._fields) + Call._fields.index("stats") - 1]
        return self._constant if stats else (*self._constant, 1, 2)  # stand-ins of statistics that nobody asked for

    def check_again(self, scalars: Sequence[Any]) -> None:
        if Call.of(scalars).group is not None:
            raise RuntimeError(
                "vocab_parallel: got a derivative of the gradient, expected first derivatives only: it would need the "
                "whole vocabulary on one rank"
            )


def _backward(grads: Tensors, inputs: Inputs, saved: Saved, call: Call, needs: Needs) -> Tensors:
    """Gradients, still in the dtypes of the computation; None where not wanted."""
    hidden, module = inputs.hidden, _module(inputs, call)
    with no_autocast(hidden.device.type):
        found = module.backward(*grads, inputs, saved, call.options, needs)
        rows, temperature, noise_scale, values = found.hidden, found.temperature, found.noise_scale, found.bias_values
        if call.group is not None:
            group = find_group(call.group)
            rows = rows if inputs.head is None else sum_shards(rows, group)
            temperature, noise_scale, values = (sum_shards(grad, group) for grad in (temperature, noise_scale, values))
        if temperature is not None and inputs.temperature is not None:
            # d(score)/dT = -score / T. Backends sum dS (score - peak); peak sum(dS) remains, and sum(dS) = grad_lse.
            if grads[1] is not None:
                temperature = temperature - saved.peak * grads[1].to(temperature.dtype)
            temperature = temperature / inputs.temperature
        return rows, found.head, found.embed, found.bias, temperature, noise_scale, values


OP = _SoftEmbed()
