"""How much of its gradient a soft token passes back: a factor, or a schedule of factors over a training.

The factor multiplies the gradient of every soft token d_k (docs/method.md §3): 1 is the paper's method, and with 0 a
soft token is a constant in backward. Gradients still reach every step through its own states, keys and values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Real

EXPECTED = "a number from 0 to 1, or a schedule such as '0:1@0.5' (from 0 to 1 over the first half of the steps)"
_NUMBER = r"([0-9]*\.?[0-9]+|[0-9]+\.)"


@dataclass(frozen=True)
class SoftTokenGradient:
    """The factor of each training step; it depends on the step alone, so a checkpoint holds no state of it.

    Attributes:
        first, last: factors in [0, 1].
        share: of the steps, in (0, 1], over which the factor goes linearly from `first` to `last`.
    """

    first: float
    last: float
    share: float = 1.0

    @classmethod
    def of(cls, value: float | str) -> SoftTokenGradient:
        """A constant factor, or the schedule "FIRST:LAST@SHARE".

        Raises:
            ValueError: it is neither, or a number is out of range.
        """
        if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1:
            return cls(float(value), float(value))
        match = re.fullmatch(f"{_NUMBER}:{_NUMBER}@{_NUMBER}", value, re.ASCII) if isinstance(value, str) else None
        if match:
            first, last, share = map(float, match.groups())
            if first <= 1 and last <= 1 and 0 < share <= 1:
                return cls(first, last, share)
        raise ValueError(f"soft_token_gradient: got {value!r}, expected {EXPECTED}")

    def at(self, step: int, total_steps: int) -> float:
        """The factor of training step `step`, from 0."""
        done = min(1.0, step / (self.share * total_steps))
        return self.last if done == 1.0 else self.first + (self.last - self.first) * done

    @property
    def largest(self) -> float:
        """The largest factor of any step."""
        return max(self.first, self.last)
