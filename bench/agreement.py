"""The verdict on engines whose results are compared: a speed means nothing where the results are wrong.

In float32 and float64 an engine's results may differ from the reference's by what rounding explains. In half precision
two right engines differ by as much as a mistake does, because twenty steps feed their rounding to one another. There
both are compared with float32: ours may be at most `FACTOR` times as far from it as the reference is, and the two
algorithms are compared strictly on a float32 copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
OK, WRONG, UNCHECKED = "ok", "WRONG", "UNCHECKED"
HALF = (torch.float16, torch.bfloat16)
# Two right engines in half precision were within 1.4 of each other's error on every shape and seed that was tried.
FACTOR = 1.5


@dataclass(frozen=True)
class Tolerance:
    """What rounding explains. For embeddings: cosine distance of the worst row, relative error of all rows together;
    for training: relative error of the losses and of the LoRA gradients."""

    cosine: float
    relative: float
    loss: float
    gradient: float


# At least five times what rounding alone was measured to do on SmolLM2's 30 layers and 5 to 20 steps (float64: the
# stock norms compute in float32). A forgotten mask, a missing step, a logit temperature of 1.1 or half a gradient is
# off by more, as tests/bench checks.
TOLERANCES = {
    torch.float64: Tolerance(cosine=1e-10, relative=1e-5, loss=1e-6, gradient=1e-5),
    torch.float32: Tolerance(cosine=1e-6, relative=1e-3, loss=1e-4, gradient=1e-3),
}


@dataclass(frozen=True)
class Difference:
    """What was compared, and the measured values by name.

    Attributes:
        engine: whose results they are.
        what: the inputs.
        measured, allowed: by name.
        why: the reason where the comparison could not be made, or the results are not even of one shape.
    """

    engine: str
    what: str
    measured: dict[str, float]
    allowed: dict[str, float]
    why: str | None = None

    @classmethod
    def of(cls, engine: str, what: str, errors: dict[str, tuple[float, float]]) -> Difference:
        """`errors`: by name what was measured and what is allowed."""
        measured, allowed = ({name: pair[i] for name, pair in errors.items()} for i in (0, 1))
        return cls(engine, what, measured, allowed)

    @property
    def verdict(self) -> str:
        """`OK`, `WRONG` or `UNCHECKED`. NaN never passes."""
        if self.too_large():
            return WRONG
        return OK if self.why is None else UNCHECKED

    def too_large(self) -> dict[str, float]:
        return {name: value for name, value in self.measured.items() if not value <= self.allowed[name]}

    def describe(self, reference: str) -> str:
        """A line for people."""
        bad = self.too_large()
        if not bad:
            return f"{self.engine} could not be compared with {reference} on {self.what}: {self.why}"
        values = ", ".join(f"{name} {value:.2e} (allowed {self.allowed[name]:.1e})" for name, value in bad.items())
        return f"{self.engine} disagrees with {reference} on {self.what}: {values}"

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Difference:
        """What `to_json` gave; a measure that JSON cannot hold, NaN or infinite, is NaN again."""
        measured = {name: math.nan if value is None else value for name, value in fields["measured"].items()}
        return cls(fields["engine"], fields["what"], measured, fields["allowed"], fields.get("why"))

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {key: value for key, value in fields.items() if value is not None} | {"verdict": self.verdict}


def unchecked(engine: str, what: str, error: BaseException) -> Difference:
    """The comparison itself ended with an error."""
    return Difference(engine, what, {}, {}, why=reason(error))


def compare_each(
    names: Iterable[str], what: str, expected: Callable[[], T], one: Callable[[str, T], Difference]
) -> list[Difference]:
    """`one(name, expected())` for every name. A comparison that raises is `UNCHECKED`; the others are still made."""
    try:
        reference = expected()
    except Exception as error:
        return [unchecked(name, what, error) for name in names]

    def attempt(name: str) -> Difference:
        try:
            return one(name, reference)
        except Exception as error:
            return unchecked(name, what, error)

    return [attempt(name) for name in names]


def reason(error: BaseException) -> str:
    """Type and first line of the message, for a line or for a table's cell."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:160]}"


def shapes_differ(engine: str, what: str) -> Difference:
    return Difference.of(engine, what, {"results of another shape": (1.0, 0.0)})


def embedding_difference(engine: str, what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Difference:
    """Final embeddings [B, D] of an engine against the reference's, both computed in `dtype`, float32 or float64."""
    if ours.shape != theirs.shape:
        return shapes_differ(engine, what)
    ours, theirs = ours.double(), theirs.double()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    tolerance = TOLERANCES[dtype]
    errors = {
        "cosine distance": ((1 - cosine).max().item(), tolerance.cosine),
        "relative error": (relative_error(ours, theirs), tolerance.relative),
    }
    return Difference.of(engine, what, errors)


def training_difference(
    engine: str, what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype
) -> Difference:
    """`losses` [K] and one gradient per LoRA parameter, computed in `dtype`, float32 or float64; all gradients
    together, and the worst single one."""
    if _shapes(ours) != _shapes(theirs):
        return shapes_differ(engine, what)
    tolerance = TOLERANCES[dtype]
    loss, gradient, worst_one = _training_errors(ours, theirs)
    errors = {
        "loss error": (loss, tolerance.loss),
        "gradient error": (gradient, tolerance.gradient),
        "worst gradient error": (worst_one, 3 * tolerance.gradient),
    }
    return Difference.of(engine, what, errors)


def embedding_rounding(
    engine: str, what: str, ours: Tensor, theirs: Tensor, exact: Tensor, *, steps: int, at_least: float = 0.0
) -> Difference:
    """Embeddings [B, D] of an engine and of the reference, both in half precision, against the float32 ones.

    Args:
        steps: K of the embeddings.
        at_least: what the reference's error is taken to be where these rows happen to show less of it.
    """
    if ours.shape != exact.shape:
        return shapes_differ(engine, what)
    own = max(typical_error(theirs, exact, steps), at_least)
    return _rounding(engine, what, {"error against float32": (typical_error(ours, exact, steps), FACTOR * own)})


def typical_error(ours: Tensor, exact: Tensor, steps: int) -> float:
    """The error of the rows of [B, D]; NaN where any of them is not finite.

    Without generated steps it is that of all rows together. After some steps the soft tokens of a few rows tip over to
    others, in one engine and not in another, and the error of such a row is a hundred times what it was. Then it is the
    geometric mean over the rows without the worst eighth (at least one).
    """
    if not torch.isfinite(ours).all():
        return math.nan
    if steps == 0:
        return relative_error(ours, exact)
    ours, exact = ours.double(), exact.double()
    errors = ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).sort().values
    kept = errors[: max(1, len(errors) - max(1, len(errors) // 8))]
    return kept.clamp_min(1e-300).log().mean().exp().item()


def training_rounding(
    engine: str, what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> Difference:
    """The same for losses and gradients.

    The errors of a few losses cancel by chance, in one engine more than in another, so their bound is at least that of
    the gradients. The bound of the worst gradient is twice as wide.
    """
    if _shapes(ours) != _shapes(exact):
        return shapes_differ(engine, what)
    loss, gradient, worst_one = _training_errors(ours, exact)
    own_loss, own, own_worst = _training_errors(theirs, exact)
    errors = {
        "loss error against float32": (loss, FACTOR * max(own_loss, own)),
        "gradient error against float32": (gradient, FACTOR * own),
        "worst gradient error against float32": (worst_one, 2 * FACTOR * own_worst),
    }
    return _rounding(engine, what, errors)


def _rounding(engine: str, what: str, errors: dict[str, tuple[float, float]]) -> Difference:
    if not all(math.isfinite(bound) for _, bound in errors.values()):
        return Difference(engine, what, {}, {}, why="the reference itself is not finite in this dtype")
    return Difference.of(engine, what, errors)


def _training_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float, float]:
    """Of the losses, of all gradients together, of the worst one; NaN where any is NaN."""
    names = [name for name in theirs if name != "losses"]
    whole = relative_error(*(torch.cat([found[name].double().flatten() for name in names]) for found in (ours, theirs)))
    single = [relative_error(ours[name], theirs[name]) for name in names]
    return relative_error(ours["losses"], theirs["losses"]), whole, math.nan if math.isnan(whole) else max(single)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||, computed in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-300)).item()


def worst(differences: Iterable[Difference]) -> dict[str, float]:
    """The largest value of each measure; NaN is larger than anything."""
    largest: dict[str, float] = {}
    for difference in differences:
        for name, value in difference.measured.items():
            before = largest.get(name, 0.0)
            largest[name] = value if math.isnan(value) or value > before else before
    return largest


def mark(rows: Sequence[dict[str, Any]], checks: Iterable[Difference]) -> None:
    """Adds to each row the `verdict` on its engine: the worst of all comparisons. An engine that nothing compares, such
    as the reference, is `OK`."""
    by_engine: dict[str, set[str]] = {}
    for difference in checks:
        by_engine.setdefault(difference.engine, set()).add(difference.verdict)
    for row in rows:
        verdicts = by_engine.get(row["engine"], set())
        row["verdict"] = next((v for v in (WRONG, UNCHECKED) if v in verdicts), OK)
