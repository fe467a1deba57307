"""Who else sees a call: function transforms, dispatch modes, tensor subclasses, forward-mode differentiation.

PyTorch has no public names for most of these questions, so the private ones stand here, apart: `torch.compile` traces
none of these functions, because every caller asks `torch.compiler.is_compiling` first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def transformed() -> bool:
    """Whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def forward_levels() -> int:
    """How many forward-mode transforms of `torch.func` are nested here."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    return sum(interpreter.key() == functorch.TransformType.Jvp for interpreter in stack)


def unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are ordinary tensors, of no subclass."""
    return _PLAIN.issuperset(map(type, tensors))


def grads_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether `torch.autograd.grad(is_grads_batched=True)` made these gradients."""
    return any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads if grad is not None)


def dispatched() -> bool:
    """Whether a dispatch mode sees every operator. One with the attribute `looks_on` only counts, and sees those that
    an op of ours is made of."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return not all(getattr(mode, "looks_on", False) for mode in _get_current_dispatch_mode_stack())
