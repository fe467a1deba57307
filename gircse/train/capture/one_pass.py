"""The two passes of one bucket on buffers that stay where they are, and the autograd node that replays them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gircse.embedder import pooled_states
from gircse.lm.lora import fused_lora, refresh_lora
from gircse.lm.rollout import Drafter, RolloutObserver
from gircse.model import GIRCSE
from gircse.train.capture.bucket import Bucket
from gircse.train.capture.checkpoints import checkpoints_without_generator
from gircse.train.capture.layers import FusedLayers
from gircse.train.capture.shared import Shared

# Replays of the forward and of the backward pass. Tests on a CPU run the functions themselves in their place.
Passes = tuple[Callable[[], None], Callable[[], None]]


def replay(captured: CapturedPass, ids: Tensor, mask: Tensor, leaf: Tensor, observer: RolloutObserver | None) -> Tensor:
    """The states [rows, K, D] of padded texts. Backward replays the other graph.

    Args:
        leaf: any tensor that requires a gradient; it gets none.
    """
    return _Replay.apply(leaf, captured, ids, mask, observer)


class CapturedPass:
    """The passes of one bucket, on buffers that stay where they are.

    Attributes:
        entropies: of the soft tokens, [rows] for each step.
        replays: of `forward` and `backward`.
    """

    replays: Passes

    def __init__(self, shared: Shared, model: GIRCSE, bucket: Bucket, drafter: Drafter | None) -> None:
        self._shared, self._model, self._bucket, self._drafter = shared, model, bucket, drafter
        self.ids = torch.zeros(bucket.rows, bucket.length, dtype=torch.int64, device=model.device)
        self.mask = torch.ones_like(self.ids)
        self.entropies: list[Tensor] = []
        self._layers = FusedLayers.of(model.causal_lm)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._reached: list[nn.Parameter] = []
        self._states: Tensor | None = None
        self._gradient: Tensor | None = None
        self._result: Tensor | None = None

    def forward(self) -> None:
        """`ids`, `mask` -> the states and entropies in their buffers, and a graph for `backward`."""
        refresh_lora(self._model.base, always=True)  # so that every replay reads the weights of then
        seen, lm = _Entropies(), self._model.causal_lm
        checkpoints = checkpoints_without_generator(lm.body, fused_lora(self._model.base), self._layers.at_work)
        with torch.enable_grad(), self._layers.at_work(), checkpoints:
            self._result = pooled_states(
                lm,
                self._model.config,
                self.ids,
                self.mask,
                self._bucket.num_steps,
                soft_token_gradient=self._bucket.soft_token_gradient,
                drafter=self._drafter,
                observer=seen,
            )
        found = self._result.detach()
        if self._states is None:  # in the run before the capture, so that no graph's memory holds the buffers
            self._states, self._gradient = torch.empty_like(found), torch.zeros_like(found)
            self.entropies = [torch.empty_like(entropy) for entropy in seen.entropies]
        torch._foreach_copy_([self._states, *self.entropies], [found, *seen.entropies])

    def backward(self, into: Callable[[nn.Parameter], Tensor] | None = None) -> None:
        """Adds the gradients of the trained weights to their buffers."""
        assert self._result is not None
        found = torch.autograd.grad(self._result, self._parameters, self._gradient, allow_unused=True)
        self._result = None
        self._reached = [p for p, own in zip(self._parameters, found, strict=True) if own is not None]
        totals = [(into or self._shared.sum_of)(p) for p in self._reached]
        torch._foreach_add_(totals, [own for own in found if own is not None])

    def warm_up(self) -> None:
        """Both passes, with nothing added."""
        self.forward()
        self.backward(torch.zeros_like)
        for parameter in self._reached:
            self._shared.sum_of(parameter)

    def run(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, object]:
        """-> a copy of the states [rows, K, D], and a token that `send` asks for."""
        self.ids.copy_(ids, non_blocking=True)
        self.mask.copy_(mask, non_blocking=True)
        self.replays[0]()
        assert self._states is not None
        self._shared.live = token = object()
        return self._states.clone(), token

    def send(self, gradient: Tensor, token: object) -> None:
        """Backward from the gradient of the states [rows, K, D].

        Raises:
            RuntimeError: another micro-batch has run since, whose activations lie in the same memory.
        """
        if token is not self._shared.live:
            raise RuntimeError(
                "captured micro-batch: got a backward pass after another micro-batch, or a second one, expected one "
                "directly after its forward pass"
            )
        self._shared.live = None
        assert self._gradient is not None
        self._gradient.copy_(gradient)
        self._shared.attach(self._reached)
        self.replays[1]()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        captured: CapturedPass,
        ids: Tensor,
        mask: Tensor,
        observer: RolloutObserver | None,
    ) -> Tensor:
        states, ctx.token = captured.run(ids, mask)
        ctx.captured, ctx.observer = captured, observer
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.observer is not None:
            ctx.observer.enter("graph")
        ctx.captured.send(gradients[0], ctx.token)
        return (None,) * 5


class _Entropies:
    """Keeps what a rollout tells its observer."""

    def __init__(self) -> None:
        self.entropies: list[Tensor] = []

    def enter(self, phase: str) -> None:
        pass

    def soft_token(self, step: int, entropy: Tensor) -> None:
        self.entropies.append(entropy)
