"""``soft_embed`` for autograd, ``torch.compile``, ``torch.func`` and CUDA graphs.

Two entrances to the same two functions, ``_forward`` and ``_backward``:

- the custom ops ``gircse::soft_embed`` and ``gircse::soft_embed_backward``, opaque to compilers, with fakes and
  autograd: for ``torch.compile``, fake tensors, tensor subclasses and dispatch modes;
- ``_SoftEmbed``, an autograd function, and without gradients not even that: for plain eager calls, where the
  dispatcher's way to a Python op would cost more than the smallest kernels; and, with a vmap rule, for ``torch.func``,
  which the autograd of custom ops does not know.

Nothing here reads a tensor's value, so both can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import soft_embed_torch, soft_embed_triton
from .backends import resolve_backend
from .soft_embed_torch import Forward, Inputs, Needs, Options, Saved, finish
from .tiles_torch import accumulation_dtype
from .vocab_parallel import find_group, merge_shards, sum_shards

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_NUM_TENSORS = len(Inputs._fields)


class Call(NamedTuple):
    """Everything of a call that is no tensor."""

    options: Options
    group: str | None = None  # of a vocabulary-parallel call
    stats: bool = False
    exact: bool = False  # a gradient will be wanted: keep what backward needs
    backend: str | None = None

    def flat(self) -> tuple[Any, ...]:
        """As the custom op takes it."""
        return (*self.options, *self[1:])

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Call:
        size = len(Options._fields)
        return cls(Options(*flat[:size]), *flat[size:])


def run(inputs: Inputs, call: Call) -> Forward:
    """The op by the cheaper entrance that fits."""
    if torch._C._are_functorch_transforms_active():
        return Forward(*_SoftEmbed.apply(*inputs, *call.flat()))
    if not eager(inputs, call.backend):
        return Forward(*_forward_op(*inputs, *call.flat()))
    if call.exact:
        return Forward(*_SoftEmbed.apply(*inputs, *call.flat()))
    return _forward(inputs, call)


def eager(tensors: Sequence[Tensor | None], backend: str | None) -> bool:
    """Whether nothing but eager PyTorch sees this call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    # the torch backend is made of PyTorch's own operators, which a dispatch mode may see one by one
    return backend == "torch" or not torch._C._len_torch_dispatch_stack()


def _module(backend: str | None, hidden: Tensor) -> ModuleType:
    return soft_embed_triton if resolve_backend(backend, hidden) == "triton" else soft_embed_torch


def _forward(inputs: Inputs, call: Call) -> Forward:
    hidden, module = inputs.hidden, _module(call.backend, inputs.hidden)
    with no_autocast(hidden.device.type):
        if call.group is None:
            return module.forward(inputs, call.options, stats=call.stats, exact=call.exact)
        state = module.scan(inputs, call.options, stats=call.stats)
        state = merge_shards(state, call.options.vocab_start, find_group(call.group))
        return finish(state, call.options, hidden.dtype, exact=call.exact)


def _forward_flat(*arguments: Any) -> tuple[Tensor, ...]:
    """``_forward`` for autograd: an empty tensor stands for what nobody asked for, as ops cannot return None."""
    found = _forward(Inputs(*arguments[:_NUM_TENSORS]), Call.of(arguments[_NUM_TENSORS:]))
    return tuple(arguments[0].new_empty(0) if tensor is None else tensor for tensor in found)


def no_autocast(device: str) -> Any:
    """A context in which products keep their dtypes; entering one costs, so only where there is something to leave."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


_NOTHING = nullcontext()


def _backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], inputs: Inputs, saved: Saved, call: Call, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Gradients in their input's dtype, None where not wanted."""
    hidden, module = inputs.hidden, _module(call.backend, inputs.hidden)
    with no_autocast(hidden.device.type):
        found = module.backward(*grads, inputs, saved, call.options, needs)
        rows, temperature = found.hidden, found.temperature
        if call.group is not None:
            group = find_group(call.group)
            rows, temperature = sum_shards(rows, group), sum_shards(temperature, group)
        if temperature is not None and inputs.temperature is not None:
            # d(score)/dT = -score / T. Backends sum dS (score - peak); peak sum(dS) remains, and sum(dS) = grad_lse.
            if grads[1] is not None:
                temperature = temperature - saved.peak * grads[1].to(temperature.dtype)
            temperature = (temperature / inputs.temperature).to(inputs.temperature.dtype)
        bias = None if found.bias is None or inputs.bias is None else found.bias.to(inputs.bias.dtype)
        return None if rows is None else rows.to(hidden.dtype), found.head, found.embed, bias, temperature


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    tensors, results = Inputs(*inputs[:_NUM_TENSORS]), Forward(*output)
    ctx.call = Call.of(inputs[_NUM_TENSORS:])
    constant = [results.exact, results.max_prob, results.argmax, results.peak, results.total]
    if not ctx.call.stats:
        constant.append(results.entropy)  # a stand-in
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)
    rounded = results.exact.shape == results.out.shape  # type: ignore[union-attr]
    kept = results.exact if rounded else results.out
    ctx.save_for_backward(*tensors, kept, results.peak, results.total, results.entropy)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = grads[0], grads[2], grads[3]
    none = (None,) * (_NUM_TENSORS + len(ctx.call.flat()))
    if all(grad is None for grad in upstream):
        return none
    inputs = Inputs(*ctx.saved_tensors[:_NUM_TENSORS])
    saved = Saved(*ctx.saved_tensors[_NUM_TENSORS:])
    needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
    if eager((*upstream, *inputs), ctx.call.backend):
        found = _backward(upstream, inputs, saved, ctx.call, needs)
    else:
        results = _backward_op(*upstream, *inputs, *saved, *ctx.call.flat(), list(needs))
        found = tuple(grad if need else None for grad, need in zip(results, needs, strict=True))
    return (*found, *none[len(found) :])


class _SoftEmbed(torch.autograd.Function):
    """The eager entrance with gradients."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward_flat(*arguments)

    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_differentiate))  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        """Rows are independent, so a batch of them is more rows; a batch of matrices is a loop."""
        inputs, rest = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:]
        if any(in_dims[i] is not None for i in _MATRICES):
            return loop(_SoftEmbed.apply, info.batch_size, in_dims, arguments)
        folded = [
            tensor if i in _MATRICES else fold(tensor, dim, info.batch_size)
            for i, (tensor, dim) in enumerate(zip(inputs, in_dims, strict=False))
        ]
        return unfold(_SoftEmbed.apply(*folded, *rest), info.batch_size)


_TENSORS = "Tensor hidden, Tensor head, Tensor? embed, Tensor? bias, Tensor? temperature, Tensor? seeds, Tensor? floor"
_SCALARS = (
    "float scalar_temperature, float? softcap, float logit_scale, float embed_scale, SymInt? seed, SymInt vocab_start, "
    "float logit_temperature, str? group, bool stats, bool exact, str? backend"
)
_SAVED = "Tensor out, Tensor peak, Tensor total, Tensor entropy"


@torch.library.custom_op(
    "gircse::soft_embed",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward_flat(*arguments)


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, call = Inputs(*arguments[:_NUM_TENSORS]), Call.of(arguments[_NUM_TENSORS:])
    hidden, values = inputs.hidden, inputs.head if inputs.embed is None else inputs.embed
    rows, width, wide = hidden.shape[0], values.shape[1], accumulation_dtype(hidden.dtype)
    nothing = hidden.new_empty(0)
    exact = call.exact and wide != hidden.dtype

    def row(dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(rows, dtype=dtype)

    return (
        hidden.new_empty((rows, width)),
        hidden.new_empty((rows, width), dtype=wide) if exact else nothing,
        row(),
        row() if call.stats else hidden.new_empty(0),
        row() if call.stats else hidden.new_empty(0),
        row(torch.int64) if call.stats else hidden.new_empty(0),
        row(),
        row(),
    )


_forward_op.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op(
    "gircse::soft_embed_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_entropy, {_TENSORS}, {_SAVED}, {_SCALARS}, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    grads, inputs, saved, call, needs = _split(arguments)
    found = _backward(grads, inputs, saved, call, needs)
    return tuple(inputs.hidden.new_empty(0) if grad is None else grad for grad in found)


def _split(arguments: Sequence[Any]) -> tuple[Any, Inputs, Saved, Call, Needs]:
    after_inputs = 3 + _NUM_TENSORS
    after_saved = after_inputs + len(Saved._fields)
    return (
        arguments[:3],
        Inputs(*arguments[3:after_inputs]),
        Saved(*arguments[after_inputs:after_saved]),
        Call.of(arguments[after_saved:-1]),
        Needs(*arguments[-1]),
    )


@_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, inputs, _, _, needs = _split(arguments)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else inputs.hidden.new_empty(0)
        for tensor, need in zip(inputs[: len(Needs._fields)], needs, strict=True)
    )


@_backward_op.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    needs, first = Needs(*arguments[-1]), 3  # of the inputs
    if any(in_dims[first + i] is not None for i in _MATRICES) or needs.head or needs.embed or needs.bias:
        return loop(_backward_op, info.batch_size, in_dims, arguments)  # a matrix gradient for each of the batch
    tensors = first + _NUM_TENSORS + len(Saved._fields)
    folded = [
        tensor if i - first in _MATRICES else fold(tensor, dim, info.batch_size)
        for i, (tensor, dim) in enumerate(zip(arguments[:tensors], in_dims, strict=False))
    ]
    return unfold(_backward_op(*folded, *arguments[tensors:]), info.batch_size)


_MATRICES = (1, 2, 3)  # head, embed, bias; all other inputs are rows


def fold(tensor: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """A batch of row tensors as one: [B, T, ..] -> [B * T, ..]."""
    if tensor is None:
        return None
    batched = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.reshape(-1, *batched.shape[2:]) if tensor.numel() else tensor.new_empty(0, *batched.shape[2:])


def unfold(results: Sequence[Tensor], batch: int) -> tuple[Any, Any]:
    """[B * T, ..] -> [B, T, ..], an empty stand-in included."""
    rows = [result.shape[0] // batch for result in results]
    return tuple(r.reshape(batch, n, *r.shape[1:]) for r, n in zip(results, rows, strict=True)), (0,) * len(results)


def loop(op: Any, batch: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, Any]:
    """The op for each element of the batch."""
    results = [
        op(
            *(
                a.select(d, i) if isinstance(a, Tensor) and isinstance(d, int) else a
                for a, d in zip(arguments, in_dims, strict=False)
            )
        )
        for i in range(batch)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
