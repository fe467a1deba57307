"""What the ops launch, without a GPU: the public ops run on meta tensors, and each kernel start is written down."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gircse_kernels import info_nce as info_nce_kernels
from gircse_kernels import launching
from gircse_kernels.plan import Device

from bench.static.compile_report import Launch
from gircse.ops import info_nce_op, soft_embed, soft_embed_op, soft_embed_triton, stepwise_info_nce


def compile_launch(launch: Launch) -> Any:
    """Has Triton compile it for the active driver's device, through the same call as a real start."""
    config = launch.config
    return launch.kernel.warmup(
        *launch.arguments,
        grid=launch.grid,
        **launch.constants,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


class Call(NamedTuple):
    """A call of a public op whose launches are wanted.

    Attributes:
        op: "soft_embed" or "info_nce".
        sizes: T, V, D, E, or B, M, K, D.
        dtype: a name of torch's.
        tied: the embedding table is the head.
        backward: the gradients of the hidden states, or of both sides of the loss, too.
    """

    op: str
    sizes: tuple[int, int, int, int]
    dtype: str
    tied: bool = True
    backward: bool = False

    def run(self) -> None:
        """The call on meta tensors."""
        empty = functools.partial(torch.empty, dtype=getattr(torch, self.dtype), device="meta")
        if self.op == "soft_embed":
            rows, vocab, width, value_width = self.sizes
            hidden = empty(rows, width, requires_grad=self.backward)
            embed = None if self.tied else empty(vocab, value_width)
            inputs, out = [hidden], soft_embed(hidden, empty(vocab, width), embed)
        else:
            rows, candidates, steps, width = self.sizes
            inputs = [empty(n, steps, width, requires_grad=self.backward) for n in (rows, candidates)]
            out = stepwise_info_nce(*inputs)
        if self.backward:
            torch.autograd.grad(out, inputs, torch.empty_like(out))  # type: ignore[arg-type]


def launches(call: Call, device: Device) -> list[Launch]:
    """What that device would be asked to run."""
    with recorded(device) as found:
        call.run()
    return found


@contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Inside, ops take meta tensors for those of a GPU like `device`, and their kernels are noted and not started."""
    found: list[Launch] = []

    def note(kernel: Any, grid: Any, arguments: Any, config: Any, **constants: Any) -> None:
        found.append(Launch(kernel, grid, arguments, config, constants))

    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Callable[..., Any]) -> None:
            stack.enter_context(patch.object(owner, name, value))

        replace(launching, "launch", note)
        for name, module in list(sys.modules.items()):
            if name.startswith("gircse_kernels.") and hasattr(module, "device_of"):
                replace(module, "device_of", lambda *_: device)
        replace(soft_embed_op, "_module", lambda *_: soft_embed_triton)
        replace(info_nce_op, "_module", lambda *_: info_nce_kernels)
        replace(torch, "is_autocast_enabled", lambda *_: False)  # PyTorch has no autocast for meta tensors
        replace(torch, "autocast", lambda *_, **__: nullcontext())
        yield found
