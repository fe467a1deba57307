"""What all captured passes of a model share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shared:
    """The buffers in which gradients are added up, and whose activations lie in the graphs' memory.

    Attributes:
        live: the token of the forward replay whose backward replay may follow.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self.live: object = None

    def sum_of(self, parameter: nn.Parameter) -> Tensor:
        """The buffer in which graphs add up the gradient of a weight."""
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(parameter)
        return self._sums[parameter]

    def attach(self, parameters: list[nn.Parameter]) -> None:
        """Makes the buffers the weights' `.grad`, which the caller of a step may have cleared or replaced."""
        fresh = []
        for parameter in parameters:
            total = self._sums[parameter]
            if parameter.grad is None:
                fresh.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)
