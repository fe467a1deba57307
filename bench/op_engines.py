"""What the op benchmarks compare: eager PyTorch, `torch.compile` of it, ours, on the same random problem.

Matrices and hidden states are drawn so that logits have a standard deviation of 3, which gives soft tokens the
entropies that models have; with flat probabilities most mistakes would cancel. `check` holds ours against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.agreement import relative_error
from bench.cases import FORWARD, OPTIONS, Matrices
from bench.verdict import WrongResultError
from gircse.ops import soft_embed, soft_embed_logits
from gircse.ops.soft_embed_reference import soft_embed_reference

Op = Callable[..., Tensor]  # of hidden, head, embed or None, and the variant of a case that is one

LOGITS = "logits"  # the variant in which they are given
ENGINE_NAMES = ("eager", "compiled", "ours")
TOLERANCE, TINY = 2.0, 1e-6  # our error may be so many times eager's, both against float64, plus a rounding of nothing


def eager(hidden: Tensor, head: Tensor, embed: Tensor | None, variant: str = "") -> Tensor:
    values = head if embed is None else embed
    if variant == LOGITS:
        return torch.softmax(hidden / OPTIONS[LOGITS]["temperature"], dim=-1) @ values
    probs = torch.softmax(hidden @ head.T, dim=-1)
    return {"": torch.matmul, "top_k": _best_of_top_k, "top_p": _mix_of_top_p}[variant](probs, values)


def _best_of_top_k(probs: Tensor, values: Tensor) -> Tensor:
    """As projects that reason with soft tokens write it: the 30 most probable, of these 0.95, renormalised."""
    top = probs.topk(OPTIONS["top_k"]["top_k"], dim=-1)
    weights = top.values / top.values.sum(-1, keepdim=True)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= OPTIONS["top_k"]["top_p"], 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights[..., None, :] @ values[top.indices])[..., 0, :]


def _mix_of_top_p(probs: Tensor, values: Tensor) -> Tensor:
    """As `generate` truncates: sort, cumulative sum, back in order; then the product."""
    ordered, order = probs.sort(dim=-1, descending=True)
    removed = ordered.cumsum(-1) - ordered >= OPTIONS["top_p"]["top_p"]
    probs = probs.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), 0)
    return (probs / probs.sum(-1, keepdim=True)) @ values


def product(hidden: Tensor, head: Tensor, embed: Tensor | None, variant: str = "") -> Tensor:
    """The least that a call with the scores in memory takes."""
    return hidden @ head.T


def compiled(backend: str = "inductor") -> Op:
    """`torch.compile` of `eager`, with nothing kept from earlier shapes (they would count as recompilations)."""
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False, backend=backend)


def ours(hidden: Tensor, head: Tensor, embed: Tensor | None, variant: str = "") -> Tensor:
    if variant == LOGITS:
        return soft_embed_logits(hidden, head if embed is None else embed, **OPTIONS[LOGITS])
    return soft_embed(hidden, head, embed, **OPTIONS.get(variant, {}))


def exact(hidden: Tensor, head: Tensor, embed: Tensor | None, variant: str = "") -> Tensor:
    """Ours by its reference, for float64."""
    if variant == LOGITS:
        head, embed = None, head if embed is None else embed  # type: ignore[assignment]
    return soft_embed_reference(hidden, head, embed, **OPTIONS.get(variant, {}))[0]


def draw_matrices(
    matrices: Matrices, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The head [V, D], and the embedding [V, D] or None where the model ties them."""
    generator, shape = torch.Generator(device).manual_seed(seed), matrices[:2]
    head = torch.randn(shape, generator=generator, device=device).mul_(shape[1] ** -0.5).to(dtype)
    if matrices.tied:
        return head, None
    return head, torch.randn(shape, generator=generator, device=device).to(dtype)


class Problem(NamedTuple):
    """One case's tensors: hidden [T, D], or logits [T, V] (requires grad where there is a backward), upstream gradient
    [T, E]."""

    hidden: Tensor
    head: Tensor
    embed: Tensor | None
    upstream: Tensor
    what: str
    variant: str = ""

    @classmethod
    def draw(cls, rows: int, what: str, head: Tensor, embed: Tensor | None, variant: str = "") -> Problem:
        generator = torch.Generator(head.device).manual_seed(1)

        def normal(columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=head.device)

        width = head.shape[0 if variant == LOGITS else 1]
        hidden = (3 * normal(width)).to(head.dtype).requires_grad_(what != FORWARD)
        return cls(hidden, head, embed, normal(head.shape[1]).to(head.dtype), what, variant)

    def call(self, op: Op) -> Callable[[], Any]:
        """What is timed. Forward and backward: the gradient of the hidden states."""
        hidden, upstream = self.hidden, self.upstream
        if self.what == FORWARD:
            return lambda: op(*self.arguments)
        return lambda: torch.autograd.grad(op(*self.arguments), hidden, upstream)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of an `Op`."""
        return (*self[:3], self.variant) if self.variant else self[:3]

    def results(self, op: Op) -> dict[str, Tensor]:
        """Everything that comes out."""
        out = op(*self.arguments)
        if self.what == FORWARD:
            return {"values": out}
        (gradient,) = torch.autograd.grad(out, self.hidden, self.upstream)
        return {"values": out.detach(), "gradient": gradient}

    def only(self, rows: Tensor, dtype: torch.dtype) -> Problem:
        """The same problem for some of the rows, which do not depend on one another."""
        return Problem(
            self.hidden.detach()[rows].to(dtype).requires_grad_(self.what != FORWARD),
            self.head.to(dtype),
            None if self.embed is None else self.embed.to(dtype),
            self.upstream[rows].to(dtype),
            self.what,
            self.variant,
        )


def check(problem: Problem, op: Op = ours, *, sample: int = 8) -> dict[str, Any]:
    """All rows are computed, evenly spread ones are compared with float64, beside eager PyTorch in the same dtype.

    Returns:
        {"rows", "errors": {"eager", "ours"}, "worst_ratio"}: relative errors of values and gradient.

    Raises:
        WrongResultError: more than `TOLERANCE` times eager's error, or not finite.
    """
    total = problem.hidden.shape[0]
    rows = torch.linspace(0, total - 1, min(sample, total), device=problem.hidden.device).round().long()
    few = problem.only(rows, problem.hidden.dtype)
    truth = problem.only(rows, torch.float64).results(exact)
    found = {
        "eager": few.results(eager),
        "ours": {name: tensor[rows] for name, tensor in problem.results(op).items()},
    }
    errors = {
        engine: {name: relative_error(tensor, truth[name]) for name, tensor in tensors.items()}
        for engine, tensors in found.items()
    }
    pairs = [(error, errors["eager"][name]) for name, error in errors["ours"].items()]
    # not `>`: a comparison with NaN is false, and NaN is wrong
    if not all(mine <= TOLERANCE * theirs + TINY for mine, theirs in pairs):
        raise WrongResultError(
            f"no speed is reported at T = {total}, {problem.what}: got relative errors {errors['ours']} against "
            f"float64, expected at most {TOLERANCE:g} times those of eager PyTorch, {errors['eager']}"
        )
    worst = max(mine / max(theirs, 1e-9) for mine, theirs in pairs)
    return {"rows": rows.tolist(), "errors": errors, "worst_ratio": worst}
