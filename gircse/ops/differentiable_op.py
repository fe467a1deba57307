"""An op whose first derivative is written by hand and whose further ones come from a plain formula.

`DifferentiableOp` gives it every entrance that PyTorch has, all to the same functions:

- the custom ops ``gircse::NAME`` and ``gircse::NAME_backward``, opaque to compilers, with fakes and autograd: for
  `torch.compile`, fake tensors, tensor subclasses and dispatch modes;
- two autograd functions with vmap rules, forward and backward: for plain eager calls, where the dispatcher's way to
  a Python op would cost more than the smallest kernels, and for `torch.func`, which does not know the autograd of
  custom ops.

The backward is an op of its own. Its derivative, where somebody asks for one (`create_graph=True` and a second
backward, `torch.func.grad` of `grad`), is that of the plain formula, by PyTorch's own autograd, and therefore has every
higher derivative too. It holds what the plain formula holds, for a block of rows at a time.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import observers
from .autocast import no_autocast
from .transforms import loop, rows_or_loop

Tensors = Sequence[Tensor | None]


class DifferentiableOp(ABC):
    """Arguments are the tensors, then the scalars; in backward the upstream gradients, the tensors, what was saved,
    the scalars, and which gradients are wanted.

    Ops return tensors alone: where a result or gradient does not exist, an empty tensor stands for it.
    """

    name: ClassVar[str]
    tensors: ClassVar[str]  # in the language of schemas, as the next one
    scalars: ClassVar[str]
    num_tensors: ClassVar[int]
    num_inputs: ClassVar[int]  # the first tensors, which have gradients
    num_results: ClassVar[int]
    upstream: ClassVar[tuple[int, ...]]  # the results that have gradients
    saved: ClassVar[tuple[int, ...]]  # the results that backward reads; no caller ever gets one
    # the tensors of which every row sees all, the others having rows; None: rows are not apart
    shared: ClassVar[tuple[int, ...] | None] = None

    @abstractmethod
    def forward(self, tensors: Tensors, scalars: Sequence[Any]) -> Tensors:
        """All results; None for one that was not asked for."""

    @abstractmethod
    def fake(self, tensors: Tensors, scalars: Sequence[Any]) -> Tensors:
        """Empty results of the same shapes."""

    @abstractmethod
    def backward(
        self, grads: Tensors, tensors: Tensors, saved: Tensors, scalars: Sequence[Any], needs: Sequence[bool]
    ) -> Tensors:
        """The gradient of each input, in its dtype; None for one that is not needed."""

    @abstractmethod
    def plain(self, tensors: Tensors, scalars: Sequence[Any]) -> Sequence[Tensor]:
        """The `upstream` results by PyTorch's own differentiable operators, in the same dtypes."""

    @abstractmethod
    def block(self, tensors: Tensors) -> int:
        """How many rows the plain formula may take at a time; entries of its first dimension if the first tensor has
        more than two."""

    def constant(self, scalars: Sequence[Any]) -> tuple[int, ...]:
        """The results without a gradient."""
        return self._constant

    @abstractmethod
    def check_again(self, scalars: Sequence[Any]) -> None:
        """Raises where the plain formula cannot stand for this call."""

    def __init__(self) -> None:
        self._constant = tuple(i for i in range(self.num_results) if i not in self.upstream)
        self.apply = _function(self.name, self._forward, self._setup, self._differentiate, self._push, self._vmap)
        self.apply_backward = _function(
            f"{self.name}_backward",
            self._backward, self._setup_backward, self._differentiate_again, self._push_backward, self._vmap_backward,
        )  # fmt: skip
        grads = ", ".join(f"Tensor? grad_{i}" for i in self.upstream)
        saved = ", ".join(f"Tensor saved_{i}" for i in self.saved)
        self.op = self._custom_op(
            self.name, f"{self.tensors}, {self.scalars}", self.num_results,
            self._forward, self._fake, self._differentiate, self._setup, self._vmap,
        )  # fmt: skip
        self.backward_op = self._custom_op(
            f"{self.name}_backward", f"{grads}, {self.tensors}, {saved}, {self.scalars}, bool[] needs", self.num_inputs,
            self._backward, self._fake_backward, self._differentiate_again, self._setup_backward, self._vmap_backward,
        )  # fmt: skip

    def _custom_op(
        self, name: str, arguments: str, results: int, run: Any, fake: Any, differentiate: Any, setup: Any, vmap: Any
    ) -> Any:
        schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"

        def reverse_only(function: Callable[..., Any], *values: Any) -> Any:
            if observers.forward_mode():  # custom ops would drop tangents without a word
                raise RuntimeError(
                    f"{name}: got forward-mode differentiation in a compiled or traced call, expected an eager call "
                    "or reverse mode"
                )
            return function(*values)

        op = torch.library.custom_op(
            f"gircse::{name}", lambda *a: reverse_only(run, *a), mutates_args=(), schema=schema
        )
        op.register_fake(lambda *a: reverse_only(fake, *a))
        op.register_autograd(differentiate, setup_context=setup)
        op.register_vmap(lambda info, in_dims, *a: vmap(op, info, in_dims, *a))
        return op

    def call(self, tensors: Tensors, scalars: Sequence[Any]) -> tuple[Tensor, ...]:
        """The op by the cheapest entrance that records gradients."""
        if not torch.compiler.is_compiling():
            if observers.transformed() and observers.forward_levels() > 1:
                raise RuntimeError(  # PyTorch would drop the outer tangents without a word
                    f"{self.name}: got forward-mode differentiation of forward-mode differentiation, expected at most "
                    "one forward level: jacfwd of jacrev, not jacfwd of jacfwd"
                )
            traced = observers.forward_mode() and observers.dispatched()  # torch.func.linearize
            if observers.transformed() or (self.eager(tensors, scalars) and not traced):
                return self.apply(*tensors, *scalars)
        return self.op(*tensors, *scalars)

    def eager(self, tensors: Tensors, scalars: Sequence[Any]) -> bool:
        """Whether eager PyTorch may run a call with these tensors operator by operator."""
        return observers.unobserved(tensors)

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return _filled(self.forward(arguments[: self.num_tensors], arguments[self.num_tensors :]), arguments[0])

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        return _filled(self.fake(arguments[: self.num_tensors], arguments[self.num_tensors :]), arguments[0])

    def _setup(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        ctx.scalars = tuple(inputs[self.num_tensors :])
        ctx.mark_non_differentiable(*[output[i] for i in self.constant(ctx.scalars)])
        ctx.set_materialize_grads(False)
        kept = *inputs[: self.num_tensors], *[output[i] for i in self.saved]
        ctx.save_for_backward(*kept)
        _save_for_forward(ctx, kept)

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = tuple(grads[i] for i in self.upstream)
        none = (None,) * (self.num_tensors + len(ctx.scalars))
        if all(grad is None for grad in upstream):
            return none
        kept = ctx.saved_tensors  # unpacked once: a checkpoint gives them no second time
        needs = list(ctx.needs_input_grad[: self.num_inputs])
        found: Tensors
        arguments = (*upstream, *kept, *ctx.scalars, needs)
        if torch.compiler.is_compiling():
            found = self.backward_op(*arguments)
        elif observers.transformed():
            found = self.apply_backward(*arguments)
        elif not self.eager((*upstream, *kept), ctx.scalars) or observers.grads_batched(upstream):
            found = self.backward_op(*arguments)
        elif torch.is_grad_enabled():
            found = self.apply_backward(*arguments)
        else:
            tensors, saved = kept[: self.num_tensors], kept[self.num_tensors :]
            found = self.backward(upstream, tensors, saved, ctx.scalars, needs)
        found = tuple(grad if need else None for grad, need in zip(found, needs, strict=True))
        return (*found, *none[len(found) :])

    def _split(self, arguments: Sequence[Any]) -> tuple[Any, Any, Any, Any, Any]:
        first, second = len(self.upstream), len(self.upstream) + self.num_tensors
        third = second + len(self.saved)
        return (
            arguments[:first],
            arguments[first:second],
            arguments[second:third],
            arguments[third:-1],
            arguments[-1],
        )

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return _filled(self.backward(*self._split(arguments)), arguments[len(self.upstream)])

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, tensors, _, _, needs = self._split(arguments)
        empty = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if need and tensor is not None else None
            for tensor, need in zip(tensors, needs, strict=False)
        ]
        return _filled(empty, tensors[0])

    def _setup_backward(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        upstream, tensors, _, scalars, needs = self._split(inputs)
        ctx.mark_non_differentiable(*(grad for grad, need in zip(output, needs, strict=True) if not need))
        ctx.set_materialize_grads(False)
        ctx.scalars, ctx.needs = tuple(scalars), tuple(needs)
        ctx.save_for_backward(*upstream, *tensors)
        _save_for_forward(ctx, (*upstream, *tensors))

    def _differentiate_again(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(self.upstream)
        found: list[Tensor | None] = [None] * (count + self.num_tensors + len(self.saved) + len(ctx.scalars) + 1)
        cotangents = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
        if any(grad is not None for grad in cotangents):
            self.check_again(ctx.scalars)
            wanted = ctx.needs_input_grad[: count + self.num_inputs]
            for i, grad in self._second(ctx.saved_tensors, ctx.scalars, cotangents, wanted).items():
                found[i] = grad
        return tuple(found)

    def _second(
        self, values: Tensors, scalars: Sequence[Any], cotangents: Tensors, wanted: Sequence[bool]
    ) -> dict[int, Tensor]:
        """Gradients of the backward towards upstream gradients and inputs, by their position in ``values``."""
        count, rows = len(self.upstream), values[len(self.upstream)].shape[0]  # type: ignore[union-attr]
        whole = range(0) if self.shared is None else [count + i for i in self.shared]
        size = rows if self.shared is None else max(1, self.block(values[count:]))
        if size >= rows:
            return self._second_block(values, scalars, cotangents, wanted)
        sums: dict[int, Tensor] = {}
        parts: dict[int, list[Tensor]] = {}
        for start in range(0, rows, size):

            def part(t: Tensor, start: int = start) -> Tensor:
                each = t.shape[0] // rows
                return t[start * each : (start + size) * each]

            def cut(tensors: Tensors, first: int, part: Callable[[Tensor], Tensor] = part) -> list[Tensor | None]:
                return [t if t is None or first + i in whole else part(t) for i, t in enumerate(tensors)]

            for i, found in self._second_block(cut(values, 0), scalars, cut(cotangents, count), wanted).items():
                if i in whole:
                    sums[i] = sums[i] + found if i in sums else found
                else:
                    parts.setdefault(i, []).append(found)
        return {**sums, **{i: torch.cat(each) for i, each in parts.items()}}

    def _second_block(
        self, values: Tensors, scalars: Sequence[Any], cotangents: Tensors, wanted: Sequence[bool]
    ) -> dict[int, Tensor]:
        chosen = [i for i, want in enumerate(wanted) if want and values[i] is not None]
        through = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        first = self._plain_backward(values, scalars, chosen, through)
        with no_autocast(values[len(self.upstream)].device.type):  # type: ignore[union-attr]
            found = pull_back(first, [values[i] for i in chosen], [cotangents[i] for i in through])  # type: ignore[misc]
        return dict(zip(chosen, found, strict=True))

    def _plain_backward(
        self, values: Tensors, scalars: Sequence[Any], chosen: Sequence[int], through: Sequence[int]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """The gradients of the inputs `through` as a function of the upstream gradients and inputs `chosen`."""
        count = len(self.upstream)
        used = [i for i in range(count) if values[i] is not None]

        def first(*primals: Tensor) -> tuple[Tensor, ...]:
            filled = _with(values, chosen, primals)

            def results(*inputs: Tensor) -> tuple[Tensor, ...]:
                found = self.plain(_with(filled[count:], through, inputs), scalars)
                return tuple(found[i] for i in used)

            return pull_back(results, [filled[count + i] for i in through], [filled[i] for i in used])  # type: ignore[misc]

        return first

    def _push(self, ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Forward-mode derivatives of the results."""
        tensors = ctx.saved_tensors[: self.num_tensors]
        self.check_again(ctx.scalars)
        moved = [i for i, tangent in enumerate(tangents[: self.num_inputs]) if tangent is not None]
        found = self._pushed(
            lambda *inputs: tuple(self.plain(_with(tensors, moved, inputs), ctx.scalars)),
            [tensors[i] for i in moved],
            [tangents[i] for i in moved],
        )
        results: list[Tensor | None] = [None] * self.num_results
        constant = self.constant(ctx.scalars)
        for i, tangent in zip(self.upstream, found, strict=True):
            results[i] = None if i in constant else tangent
        return tuple(results)

    def _push_backward(self, ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Forward-mode derivatives of the gradients."""
        self.check_again(ctx.scalars)
        values = ctx.saved_tensors
        candidates = len(self.upstream) + self.num_inputs
        moved = [i for i, tangent in enumerate(tangents[:candidates]) if tangent is not None]
        through = [i for i, need in enumerate(ctx.needs) if need]
        found = self._pushed(
            self._plain_backward(values, ctx.scalars, moved, through),
            [values[i] for i in moved],
            [tangents[i] for i in moved],
        )
        results: list[Tensor | None] = [None] * self.num_inputs
        for i, tangent in zip(through, found, strict=True):
            results[i] = tangent
        return tuple(results)

    def _pushed(self, function: Callable[..., tuple[Tensor, ...]], primals: Any, tangents: Any) -> tuple[Tensor, ...]:
        """The Jacobian-vector product, as the transpose of the vector-Jacobian product, which is linear."""
        with no_autocast(primals[0].device.type):
            zeros = [torch.zeros_like(result) for result in function(*primals)]
            return pull_back(lambda *upstream: pull_back(function, primals, upstream), zeros, tangents)

    def _vmap(self, op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        if self.shared is None:
            return loop(op, info.batch_size, in_dims, arguments)
        return rows_or_loop(op, self.shared, self.num_tensors, info.batch_size, in_dims, arguments)

    def _vmap_backward(self, op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        first, needs = len(self.upstream), arguments[-1]
        # a shared tensor has a gradient for each of the batch
        if self.shared is None or any(i < len(needs) and needs[i] for i in self.shared):
            return loop(op, info.batch_size, in_dims, arguments)
        shared, tensors = [first + i for i in self.shared], first + self.num_tensors + len(self.saved)
        return rows_or_loop(op, shared, tensors, info.batch_size, in_dims, arguments)


def _function(name: str, forward: Any, setup: Any, backward: Any, jvp: Any, vmap: Any) -> Callable[..., Any]:
    """An eager entrance: the way to call an autograd function made of these."""
    made: Any
    members = {
        "forward": _plain_function(forward),
        "setup_context": _plain_function(setup),
        "backward": _plain_function(backward),
        "jvp": _plain_function(jvp),
        "vmap": staticmethod(lambda info, in_dims, *arguments: vmap(made.apply, info, in_dims, *arguments)),
    }
    made = type(name, (torch.autograd.Function,), members)
    return made.apply


def _plain_function(method: Callable[..., Any]) -> staticmethod:
    """What compiled autograd can trace, a function and no method, and a function that knows its signature.

    PyTorch asks for the signature at each call, and looking for it takes longer than everything else of the call.
    """

    def function(*arguments: Any) -> Any:
        return method(*arguments)

    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return staticmethod(function)


def pull_back(
    function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product of a function, differentiable where gradients are recorded."""
    if observers.transformed():
        return torch.func.vjp(function, *primals)[1](tuple(cotangents))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: one tensor may be several arguments, and an argument may be what another was made of
        aliases = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in primals]
        results = function(*aliases)
        pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(p) for p in primals)
        found, upstream = zip(*pairs, strict=True)
        return torch.autograd.grad(
            found, aliases, upstream, create_graph=again, allow_unused=True, materialize_grads=True
        )


def _save_for_forward(ctx: Any, kept: Tensors) -> None:
    if not torch.compiler.is_compiling() and (observers.forward_mode() or observers.transformed()):
        ctx.save_for_forward(*kept)


def _with(values: Tensors, places: Sequence[int], new: Sequence[Tensor]) -> list[Tensor | None]:
    filled = list(values)
    for i, tensor in zip(places, new, strict=True):
        filled[i] = tensor
    return filled


def _filled(results: Tensors, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in results)
