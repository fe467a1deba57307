"""What one step asks of the device: the kernels that are started, and the bytes that they read and write."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gircse.engine.pool import KVPool
from gircse.engine.state import DecodeState


class StepCost(NamedTuple):
    """Of a step of `rows` rows with `slots` slots each, or of a Jacobi pass, with several `tokens` of each row.

    Attributes:
        launches: kernels, where each product or other operator of PyTorch counts as one.
        bytes: the operands of all kernels, each once for each kernel, and the keys and values of all slots once. What
            a kernel finds in a cache counts too.
    """

    rows: int
    slots: int
    launches: int
    bytes: int
    tokens: int = 1


def step_cost(step: Callable[[], None], pool: KVPool, state: DecodeState, slots: int, tokens: int = 1) -> StepCost:
    """Runs the step, or a Jacobi pass of `tokens` a row, once and counts."""
    counter, rows = _Counter([*pool.tensors(), state.states]), len(state.hidden)
    with ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            from gircse_kernels.launching import telling

            stack.enter_context(telling(counter.add))
        stack.enter_context(counter)
        step()
    pool_bytes = pool.bytes * rows * slots // pool.tokens
    return StepCost(rows, slots, counter.launches, counter.bytes + pool_bytes, tokens)


class _Counter(TorchDispatchMode):
    """Counts operators of PyTorch that start a kernel; Triton's kernels are told to `add`.

    Args:
        large: tensors of which a kernel touches a part only; their bytes are not counted.
    """

    looks_on = True  # soft_embed shows it PyTorch's operators instead of itself (`gircse.ops.observers`)

    def __init__(self, large: Iterable[Tensor]) -> None:
        super().__init__()
        self.launches = self.bytes = 0
        self._large = {tensor.untyped_storage().data_ptr() for tensor in large}

    def add(self, operands: Iterable[Any]) -> None:
        self.launches += 1
        seen = {id(operand): operand for operand in operands if isinstance(operand, Tensor)}
        for tensor in seen.values():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._large:
                self.bytes += min(tensor.nbytes, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)  # an operator that is made of others
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket not in _NO_KERNEL:
            self.add(tree_leaves((args, kwargs, result)))
        return result


_NO_KERNEL = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
    torch.ops.aten._unsafe_view,
    torch.ops.aten.lift_fresh,
    torch.ops.aten._reshape_alias,
    torch.ops.aten.alias,
    torch.ops.aten.detach,
    torch.ops.aten.set_,
}
