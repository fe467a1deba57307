"""No speed without agreement: engines that compute different things must not be compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """What rounding explains. For embeddings: cosine distance of the worst row, relative error of all rows together;
    for training: relative error of the losses and of the LoRA gradients."""

    cosine: float
    relative: float
    loss: float
    gradient: float


# At least five times what rounding alone was measured to do on SmolLM2's 30 layers and 5 to 20 steps (float64: the
# stock norms compute in float32). In float32 a forgotten mask, a missing step, a logit temperature of 1.1 or half a
# gradient is off by more, in half precision the gross mistakes are: tests/bench holds that. What half precision hides,
# `--dtype float32` shows.
TOLERANCES = {
    torch.float64: Tolerance(cosine=1e-10, relative=1e-5, loss=1e-6, gradient=1e-5),
    torch.float32: Tolerance(cosine=1e-6, relative=1e-3, loss=1e-4, gradient=1e-3),
    torch.float16: Tolerance(cosine=1e-4, relative=1e-2, loss=2e-2, gradient=3e-2),
    torch.bfloat16: Tolerance(cosine=1e-3, relative=3e-2, loss=1e-1, gradient=1e-1),
}


class Disagreement(RuntimeError):
    """Two engines give different results; the message holds the measured difference."""


@dataclass(frozen=True)
class Difference:
    """What was compared, and the measured values by name."""

    engine: str
    what: str
    measured: dict[str, float]
    allowed: dict[str, float]

    def check(self, reference: str) -> Difference:
        """Returns itself, or raises Disagreement. NaN never passes."""
        bad = {name: value for name, value in self.measured.items() if not value <= self.allowed[name]}
        if bad:
            values = ", ".join(f"{name} {value:.2e} (allowed {self.allowed[name]:.0e})" for name, value in bad.items())
            raise Disagreement(
                f"{self.engine} disagrees with {reference} on {self.what}: {values}; no speed is reported"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def embedding_difference(engine: str, what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Difference:
    """Final embeddings [B, D] of an engine against the reference's."""
    if ours.shape != theirs.shape:
        raise Disagreement(
            f"{engine} on {what}: got embeddings {tuple(ours.shape)}, the reference {tuple(theirs.shape)}"
        )
    ours, theirs = ours.double(), theirs.double()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    tolerance = TOLERANCES[dtype]
    return Difference(
        engine,
        what,
        {"cosine distance": (1 - cosine).max().item(), "relative error": relative_error(ours, theirs)},
        {"cosine distance": tolerance.cosine, "relative error": tolerance.relative},
    )


def training_difference(
    engine: str, what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype
) -> Difference:
    """`losses` [K] and one gradient per LoRA parameter; all gradients together, and the worst single one."""
    if ours.keys() != theirs.keys():
        raise Disagreement(f"{engine} on {what}: got gradients of {len(ours)} tensors, the reference of {len(theirs)}")
    names = [name for name in theirs if name != "losses"]
    tolerance = TOLERANCES[dtype]
    whole = relative_error(*(torch.cat([g[name].flatten() for name in names]) for g in (ours, theirs)))
    return Difference(
        engine,
        what,
        {
            "loss error": relative_error(ours["losses"], theirs["losses"]),
            "gradient error": whole,
            "worst gradient error": max(relative_error(ours[name], theirs[name]) for name in names),
        },
        {
            "loss error": tolerance.loss,
            "gradient error": tolerance.gradient,
            "worst gradient error": 3 * tolerance.gradient,
        },
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||, computed in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-300)).item()


def worst(differences: list[Difference]) -> dict[str, float]:
    """The largest value of each measure."""
    found: dict[str, float] = {}
    for difference in differences:
        for name, value in difference.measured.items():
            found[name] = max(value, found.get(name, 0.0))
    return found
